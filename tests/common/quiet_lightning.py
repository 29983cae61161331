"""Lightning's Trainer on the CPU, without anything that it would print or write."""

import torch


def fit(module, batches, folder, epochs=1, load=None, **settings):
    """Trains on these batches as they are, from the checkpoint `load` if there is one; returns the trainer."""
    import lightning.pytorch as lightning  # not above: pytest reads this module for doctests without it, too

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=load)
    return trainer
