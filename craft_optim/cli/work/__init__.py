"""The work of each command, in a module of its name: `run(args)`. Imported when the command is run, as torch is."""
