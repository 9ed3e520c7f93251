"""`fxprune prune`: remove units."""

from __future__ import annotations

from pathlib import Path
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

__all__ = ["prune"]


def prune(
    model: Model,
    out: Out,
    ratio: Annotated[
        str | None,
        typer.Option(metavar="X", help="Share of the block Linears to remove; 0.1,0.2: a model each."),
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="X", help="Or: most parameters of the slim model, such as 100M.")
    ] = None,
    target_macs: Annotated[str | None, typer.Option(metavar="X", help="Or: most MACs per token, such as 90M.")] = None,
    target_bytes: Annotated[
        str | None, typer.Option(metavar="X", help="Or: most bytes of the weights, such as 400M.")
    ] = None,
    target_speedup: Annotated[
        str | None, typer.Option(metavar="X", help="Or: how much faster by --table; it is measured.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency table for it (fxprune bench --table).")
    ] = None,
    method: Annotated[
        str,
        typer.Option(metavar="NAME", help="channel, fisher, osscar, flap, wanda-sp, taylor, magnitude, depth, ..."),
    ] = "channel",
    calibration: Calibration = None,
    text_field: TextField = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Same widths in every layer.")] = False,
    round_to: Annotated[
        int | None, typer.Option(help="Kept MLP widths are multiples of this.", min=1, metavar="N")
    ] = None,
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
    """Remove heads, MLP channels, ...; slim, verify, save."""
    from fxprune.cli.options import parse_options, targets_of
    from fxprune.flows import verbs

    name = verbs.method_of(method, "prune")
    given: dict[str, Any] = {
        "calibration": calibration,
        "text_field": text_field,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }
    given |= {"uniform": uniform or None, "round_to": round_to}
    others: dict[str, Any] = {
        "guard": guard,
        "measure_speed": measure_speed,
        "threads": threads,
        "device": device,
        "dtype": dtype,
    }
    more = parse_options(name, option or [], prune)
    targets = {"ratio": ratio, "target_params": target_params, "target_macs": target_macs}
    targets |= {"target_bytes": target_bytes, "target_speedup": target_speedup}
    given |= targets_of(targets, table=table, mix=more.pop("mix", None))
    finish(
        verbs.prune(
            model, out=out, method=method, ppl=ppl or (), overwrite=overwrite, say=say, **others, **given, **more
        ),
        json,
    )
