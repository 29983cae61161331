"""A chat model in Lightning is trained as in a loop of one's own, bit for bit, and its constraint stands in the log."""

import copy

import pytest
import torch

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache
from craft_optim.chat import batch_of, chat_anchors
from craft_optim.chat.rows import answered

lightning = pytest.importorskip("lightning.pytorch", reason="pip install --group integrations")
from quiet_lightning import fit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*does not have many workers")

EPSILON = 0.02


def chats(answers):
    return [
        {"messages": [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


OLD = chats(["no", "no, it is cold", "blue", "a green button", "a drawer", "a red drawer", "the sky"])
NEW = chats(["yes", "yes, the sky is hot", "ice", "red", "a red button and a green drawer", "hot"])


class Module(lightning.LightningModule):
    def __init__(self, model, folder):
        super().__init__()
        self.model, self.folder = model, folder

    def configure_optimizers(self):
        return optimizer_of(self.model, self.folder)

    def training_step(self, batch, number):
        return self.model(**batch).loss

    def on_train_batch_end(self, *_):
        metrics = self.optimizers().metrics
        self.log_dict({f"craft/{name}": metrics[name] for name in ("drift", "epsilon", "lambda")})


def optimizer_of(model, folder):
    retention = AnchorCache.open(folder).retention(model, batch_size=4)
    return CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), retention, epsilon=EPSILON)


@pytest.fixture
def batches(tokenizer):
    rows = [answered(record, tokenizer) for record in NEW]
    return [batch_of(rows[i : i + 2]) for i in (0, 2, 4)]


@pytest.fixture
def anchors(llama, tokenizer, tmp_path):
    return chat_anchors(llama, tokenizer, OLD, tmp_path / "anchors", dtype=torch.float32).path


@pytest.mark.parametrize("interrupted", [False, True])
def test_it_trains_as_a_loop_of_ones_own(llama, anchors, batches, tmp_path, interrupted):
    model = copy.deepcopy(llama)
    optimizer = optimizer_of(model, anchors)
    for _ in range(4):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    resumed = None
    if interrupted:
        resumed = tmp_path / "half.ckpt"
        fit(Module(copy.deepcopy(llama), anchors), batches, tmp_path, 2).save_checkpoint(resumed)
    trainer = fit(Module(found := copy.deepcopy(llama), anchors), batches, tmp_path, 4, resumed)
    for name, p in model.named_parameters():
        assert torch.equal(p, found.get_parameter(name)), name
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(
        {f"craft/{name}": optimizer.metrics[name] for name in ("drift", "epsilon", "lambda")}
    )
    assert 0.0 < logged["craft/drift"] < 1.25 * EPSILON
