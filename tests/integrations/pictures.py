"""A small Qwen2-VL, and examples with pictures of different sizes and numbers, as its processor gives them."""

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, START, END = 30, 28, 29  # tokens


def _since_5() -> bool:
    import transformers  # not above: doctests are looked for in this file, too, where it is not installed

    return not transformers.__version__.startswith("4")


def qwen(seed: int = 0) -> nn.Module:
    import transformers

    rope = "rope_parameters" if _since_5() else "rope_scaling"
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.Qwen2VLConfig(
            text_config={
                "vocab_size": 40,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "initializer_range": 0.2,
                rope: {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2,
            },
            image_token_id=IMAGE, video_token_id=31, vision_start_token_id=START, vision_end_token_id=END,
        )  # fmt: skip
        model: nn.Module = transformers.Qwen2VLForConditionalGeneration(config)
        return model


Example = dict[str, Tensor]


def examples(count: int = 12, seed: int = 1, pictures: bool = True) -> list[Example]:
    """With none to two pictures, of other sizes, and texts of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        grids = [(1, 4, 2 * (1 + int(torch.randint(3, (), generator=generator)))) for _ in range(number % 3)]
        grids = grids if pictures else []
        text = torch.randint(1, 28, (3 + number % 4,), generator=generator).tolist()
        ids = [x for _, h, w in grids for x in (START, *[IMAGE] * (h * w // 4), END)] + text
        found.append(
            {
                "input_ids": torch.tensor(ids),
                "pixel_values": torch.randn(sum(h * w for _, h, w in grids), 24, generator=generator),
                "image_grid_thw": torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
            }
        )
    return found


def collate(rows: list[Example]) -> dict[str, Tensor]:
    """As the processor does."""
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if _since_5():
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    for name in ("pixel_values", "image_grid_thw"):
        flat = torch.cat([row[name] for row in rows])
        if len(flat):
            batch[name] = flat
    return batch


def lengths(batch: Any) -> dict[str, Tensor]:
    """Pictures and patches of each example."""
    pictures = (batch["input_ids"] == START).sum(1)
    patches = batch["image_grid_thw"].prod(1).split(pictures.tolist())
    return {"image_grid_thw": pictures, "pixel_values": torch.stack([x.sum() for x in patches])}
