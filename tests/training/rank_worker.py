"""What one of several ranks does for `test_ranks`: many checks in one start, for importing torch takes longer than any of them.

torchrun -m tests.training.rank_worker FOLDER SCENARIO...; rank 0 writes FOLDER/SCENARIO-RANKS.json for each.
"""

import json
import sys
from pathlib import Path

import torch

from fastgen._ranks import meet, process_group
from fastgen.models import Glow
from fastgen.ops._packed_weights import WEIGHTS
from fastgen.training import Callback, FlowOptions, FlowTrainer, Spread

from . import rank_cases
from .rank_cases import CASES, losses
from .tiny import state

HALF = 3  # steps


def curves(ranks, folder):
    """Losses of every training, each rank with the whole model."""
    return {name: losses(make(Spread(ranks))) for name, make in CASES.items()}


def few_curves(ranks, folder):
    return {name: losses(CASES[name](Spread(ranks))) for name in ("diffusion", "gated", "glow")}


def shared_curves(ranks, folder):
    """The same with FSDP2."""
    return {name: losses(make(Spread(ranks, fsdp=True))) for name, make in CASES.items()}


def accumulated_curves(ranks, folder):
    found = {}
    for name in ("diffusion", "factorized", "glow"):
        found[name] = losses(CASES[name](Spread(ranks, accumulate=3)))
        found[f"{name}, fsdp"] = losses(CASES[name](Spread(ranks, accumulate=2, fsdp=True)))
    return found


def rounded_curves(ranks, folder):
    """In float32, and with autocast."""
    return {
        "float32": losses(rank_cases.diffusion(Spread(ranks), torch.float32)),
        "autocast": losses(rank_cases.diffusion(Spread(ranks), torch.float32, autocast=True)),
        "autocast, fsdp": losses(rank_cases.diffusion(Spread(ranks, fsdp=True), torch.float32, autocast=True)),
    }


def other_beginnings(ranks, folder):
    """Losses where each rank brings weights of its own."""
    found = {}
    for fsdp in (False, True):
        model = rank_cases.unet()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += ranks.rank
        found[str(fsdp)] = losses(rank_cases.diffusion(Spread(ranks, fsdp=fsdp), model=model))
    return found


def checkpoints(ranks, folder):
    """Save half way, on this number of ranks; and go on from what one process has saved half way."""
    found = {}
    for name, fsdp in (("whole", False), ("shared", True)):
        first = rank_cases.diffusion(Spread(ranks, fsdp=fsdp))
        first.fit(HALF)
        first.save(folder / f"{name}-{ranks.world_size}.safetensors")
        second = rank_cases.diffusion(Spread(ranks, fsdp=fsdp))
        second.restore(folder / "one.safetensors")
        found[name] = losses(second)
        record = second.save_weights(folder / f"{name}-weights-{ranks.world_size}.safetensors", more={"a": 1})
        assert (record is not None) == ranks.first
    return found


def other_number(ranks, folder):
    """Go on from what two ranks have saved half way."""
    found = {}
    for name in ("whole", "shared"):
        trainer = rank_cases.diffusion(Spread(ranks))
        trainer.restore(folder / f"{name}-2.safetensors")
        found[name] = losses(trainer)
    return found


def dropout(ranks, folder):
    """Whether a resumed run with dropout is the undisturbed one, bit for bit."""
    whole = rank_cases.mixture(Spread(ranks), dropout=0.5)
    undisturbed = losses(whole)
    first = rank_cases.mixture(Spread(ranks), dropout=0.5)
    first.fit(HALF)
    first.save(folder / "dropout.safetensors")
    torch.manual_seed(1234 + ranks.rank)  # it must not depend on what this process drew in between
    second = rank_cases.mixture(Spread(ranks), dropout=0.5)
    second.restore(folder / "dropout.safetensors")
    resumed = losses(second)
    ours, theirs = state(second), state(whole)
    return {
        "equal": all(torch.equal(ours[name], theirs[name]) for name in theirs) and resumed == undisturbed[HALF:],
        "differs": undisturbed != losses(rank_cases.mixture(Spread(ranks))),
    }


def raised(act):
    """The name of what ``act`` raises, and its text."""
    try:
        act()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def failures(ranks, folder):
    """What every rank raises where something is wrong with one of them."""
    trainer = rank_cases.diffusion(Spread(ranks))
    trainer.fit(1)
    before = {name: tensor for name, tensor in state(trainer).items() if not name.startswith("random.")}
    clean = trainer.images.clone()
    if ranks.rank == 1:
        trainer.images[:] = torch.nan
    seen = {"nan": raised(lambda: trainer.fit(3))}
    after = state(trainer)
    seen["untouched"] = trainer.step == 1 and all(torch.equal(after[name], before[name]) for name in before)
    trainer.images[:] = clean
    (folder / "file").touch()
    seen["unwritable"] = raised(lambda: trainer.save(folder / "file" / "c.safetensors"))
    seen["missing"] = raised(lambda: trainer.restore(folder / "missing.safetensors"))
    seen["few"] = raised(lambda: rank_cases.diffusion(Spread(ranks, accumulate=4)))
    model = Glow(1, 8, num_levels=1, num_steps=1, hidden_channels=4).double()
    options, x = FlowOptions(levels=rank_cases.LEVELS), rank_cases.images()[0]
    seen["not begun"] = raised(lambda: FlowTrainer(model, options, x, spread=Spread(ranks)))
    trainer.fit(2)  # and all that has left the ranks in step
    gathered = [None] * ranks.world_size
    torch.distributed.all_gather_object(gathered, seen)
    return gathered


class StopAt(Callback):
    def on_step(self, trainer, loss):
        if trainer.ranks.rank == 1 and trainer.step == 2:
            trainer.stop()


def stops(ranks, folder):
    """The step at which each rank ends where the second wishes to, after two."""
    trainer = rank_cases.diffusion(Spread(ranks))
    trainer.fit(9, [StopAt()])
    gathered = [None] * ranks.world_size
    torch.distributed.all_gather_object(gathered, trainer.step)
    return gathered


def shares(ranks, folder):
    """The largest part of all numbers that a rank keeps of weights, average and moments."""
    trainer = rank_cases.diffusion(Spread(ranks, fsdp=True))
    trainer.fit(1)
    kinds = {"weights": [*trainer.model.parameters()], "average": [*trainer.ema.model.parameters()]}
    for moment in ("exp_avg", "exp_avg_sq"):
        kinds[moment] = [trainer.optimizer.state[p][moment] for p in trainer.model.parameters()]
    return {
        name: sum(x.to_local().untyped_storage().nbytes() for x in tensors) / sum(x.nbytes for x in tensors)
        for name, tensors in kinds.items()
    }


def packed(ranks, folder):
    """Losses of a network whose layers keep packed weights; what is kept of them between steps, and within."""
    trainer = rank_cases.pixel_cnn(Spread(ranks, fsdp=True), torch.float32)
    kept = []
    trainer.model.out.register_forward_hook(lambda *_: kept.append(WEIGHTS.bytes))
    seen = losses(trainer)
    return {"losses": seen, "within": min(kept), "between": WEIGHTS.bytes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = meet()
    with process_group(ranks, torch.device("cpu")):
        for scenario in sys.argv[2:]:
            found = globals()[scenario](ranks, Path(sys.argv[1]))
            if ranks.first:
                (Path(sys.argv[1]) / f"{scenario}-{ranks.world_size}.json").write_text(json.dumps(found))
