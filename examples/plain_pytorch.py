"""FRUGAL in a plain PyTorch loop that is saved and resumed. Needs torch only.

    python examples/plain_pytorch.py

A byte-level language model learns Python's own help texts. Started again, it resumes from its last checkpoint.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from frugal_dist import Frugal, checkpoint, split_parameters

STEPS, BATCH, LENGTH, WIDTH = 60, 32, 64, 128
FOLDER = "runs/plain_pytorch"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer


class Model(nn.Module):
    """A small causal transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.lm_head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.embedding(tokens) + self.positions, mask=mask, is_causal=True)
        return self.lm_head(hidden)


def batch_of(step: int) -> Tensor:
    """The same rows whenever this step is taken."""
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[start : start + LENGTH + 1] for start in starts]).to(DEVICE)


torch.manual_seed(0)
model = Model().to(DEVICE)
optimizer = Frugal(split_parameters(model), lr=2e-3, density=0.25, update_gap=20, projection="svd")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
done, extra = checkpoint.load_latest(FOLDER, model, optimizer) or (0, {})
if extra:
    checkpoint.load_schedule(schedule, extra["schedule"])

for step in range(done + 1, STEPS + 1):
    rows = batch_of(step)
    loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step == 1 or step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
        checkpoint.save_step(FOLDER, step, model, optimizer, {"schedule": schedule.state_dict()}, keep_last=2)

print(optimizer.summary())
