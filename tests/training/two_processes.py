"""One optimiser step of every family under Trainer; writes the gradients. Run by test_processes.py,
or torchrun.

python two_processes.py WHOLE [ACCUMULATED]

Files FAMILY.safetensors in a folder for steps of the whole batch, and in another for steps that
accumulate two halves.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from deqzoo.data.graphs import collate_graphs
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.training.norms import freeze_batch_norm
from deqzoo.training.run import leave_process_group

SOLVER = {"name": "anderson", "max_steps": 40, "tol": 1e-6}
GRADIENT = {"name": "upg", "steps": 2, "damping": 0.8}


def text():
    config = DEQTransformerConfig(
        vocab_size=30, d_model=16, d_embed=16, n_head=2, d_inner=16, cutoffs=[10], mem_len=4,
        local_size=5, initializer_range=0.2, solver=SOLVER, gradient=GRADIENT,
    )  # fmt: skip
    rows = torch.arange(8 * 6).reshape(8, 6) * 7 % 30
    return DEQTransformerForCausalLM(config), [{"input_ids": r, "labels": r} for r in rows], None


def images():
    config = MDEQConfig(
        channels=[8, 8], head_channels=[4, 4], final_channels=16, expansion=1, num_groups=2,
        image_size=8, num_labels=3, solver=SOLVER, gradient=GRADIENT,
    )  # fmt: skip
    model = MDEQForImageClassification(config)
    assert freeze_batch_norm(model) > 0
    pixels = torch.randn(8, 3, 8, 8)
    return model, [{"pixel_values": p, "labels": i % 3} for i, p in enumerate(pixels)], None


def graphs():
    from torch_geometric.data import Data

    config = IGNNConfig(
        num_features=3, hidden_sizes=[8], num_labels=2, dropout=0.0,
        solver={"name": "fixed_point", "max_steps": 60, "tol": 1e-6}, gradient=GRADIENT,
    )  # fmt: skip
    data = []
    for i in range(8):
        ring = torch.arange(4 + i % 3)
        edges = torch.stack((ring, ring.roll(1)))
        edges = torch.cat((edges, edges.flip(0)), 1)
        data.append(Data(x=torch.randn(len(ring), 3), edge_index=edges, y=torch.tensor([i % 2])))
    return IGNNForGraphClassification(config), data, collate_graphs


FAMILIES = {"text": text, "images": images, "graphs": graphs}


class Gradients(TrainerCallback):
    """Writes the gradients before the optimiser uses them."""

    def __init__(self, path):
        self.path = path

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.is_world_process_zero:
            found = {
                name.removeprefix("module."): p.grad.contiguous().clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
            save_file(found, self.path)


def step(family, path, accumulation):
    torch.manual_seed(0)
    model, data, collator = FAMILIES[family]()
    processes = 2 if torch.distributed.is_torchelastic_launched() else 1
    arguments = TrainingArguments(
        output_dir=str(Path(path).parent / "out"), max_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=8 // processes // accumulation, use_cpu=True, report_to="none",
        gradient_accumulation_steps=accumulation, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    assert arguments.world_size == processes
    Trainer(
        model, arguments, data_collator=collator, train_dataset=data, callbacks=[Gradients(path)]
    ).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for accumulation, folder in enumerate(sys.argv[1:], start=1):
        for name in FAMILIES:
            step(name, Path(folder) / f"{name}.safetensors", accumulation)
    leave_process_group()
