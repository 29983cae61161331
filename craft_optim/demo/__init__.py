"""Short runs that show what the optimizer does, beside the base alone; `craft-optim demo` starts them."""
