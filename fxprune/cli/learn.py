"""`fxprune learn`: gates that learn which units stay."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxprune.cli.common import DEFAULT_THREADS, Device, Dtype, Json, Model, Overwrite, finish, say
from fxprune.cli.texts import (
    Calibration,
    Guard,
    MeasureSpeed,
    Option,
    Out,
    Ppl,
    Samples,
    Seed,
    SeqLen,
    TextField,
    Threads,
)

__all__ = ["learn"]


def learn(
    model: Model,
    out: Out,
    ratio: Annotated[
        str | None, typer.Option(metavar="X", help="Share of the block Linears' parameters to remove.")
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="X", help="Or: most parameters of the slim model, such as 100M.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="l0.")] = "l0",
    calibration: Calibration = None,
    text_field: TextField = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the training.", min=0, metavar="N")] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="X", help="Or: times that the samples are read; 1 by default.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.", min=1, metavar="N")] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of LoRA; 0 learns masks alone.", min=0, metavar="N")
    ] = None,
    post_data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Instruction set to fine-tune on, with post_steps.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the training is kept; OUT.training by default, or `none`.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier training away.")] = False,
    ppl: Ppl = None,
    guard: Guard = "python",
    measure_speed: MeasureSpeed = False,
    threads: Threads = DEFAULT_THREADS,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = None,
    option: Option = None,
) -> None:
    """Learn with gates and LoRA what stays; slim, verify, save."""
    from fxprune.cli.options import parse_options, targets_of
    from fxprune.flows import verbs

    given: dict[str, Any] = {
        "calibration": calibration,
        "text_field": text_field,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }
    given |= {"steps": steps, "epochs": epochs, "batch": batch, "lora_rank": lora_rank, "post_data": post_data}
    others: dict[str, Any] = {
        "guard": guard,
        "measure_speed": measure_speed,
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }
    more = parse_options(verbs.method_of(method, "learn"), option or [], learn)
    targets = {"ratio": ratio, "target_params": target_params}
    for name in ("target_macs", "target_bytes", "target_speedup"):
        if name in more:
            targets[name] = str(more.pop(name))
    given |= targets_of(targets, table=more.pop("table", None), mix=more.pop("mix", None))
    result = verbs.learn(
        model, out=out, method=method, state=state, restart=restart, ppl=ppl or (), overwrite=overwrite, say=say,
        **others, **given, **more,
    )  # fmt: skip
    finish(result, json)
