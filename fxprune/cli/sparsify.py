"""`fxprune sparsify`: set single weights to zero."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxprune.cli.common import DEFAULT_THREADS, Device, Dtype, Json, Model, Overwrite, finish, say
from fxprune.cli.texts import Calibration, MeasureSpeed, Option, Out, Ppl, Samples, Seed, SeqLen, TextField, Threads

__all__ = ["sparsify"]


def sparsify(
    model: Model,
    out: Out,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="X", help="Share of each projection to set to zero; 0.5 by default."),
    ] = None,
    pattern: Annotated[str | None, typer.Option(metavar="N:M", help="Or keep N of every M, such as 2:4.")] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="sparsegpt, wanda, alps, magnitude.")] = "sparsegpt",
    calibration: Calibration = None,
    text_field: TextField = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only projections like this, such as '*.k_proj'; repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave projections like this dense; repeat.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Block by block from the shards; goes on after an interruption.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw unfinished work away.")] = False,
    ppl: Ppl = None,
    measure_speed: MeasureSpeed = False,
    threads: Threads = DEFAULT_THREADS,
    device: Device = "cpu",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json: Json = None,
    option: Option = None,
) -> None:
    """Set single weights to zero; verify, save with masks."""
    from fxprune.cli.options import parse_options
    from fxprune.flows import verbs

    given: dict[str, Any] = {
        "calibration": calibration,
        "text_field": text_field,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
    }
    given |= {"sparsity": sparsity, "pattern": pattern, "include": include or None, "exclude": exclude or None}
    others: dict[str, Any] = {
        "measure_speed": measure_speed,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "stream": stream,
    }
    more = parse_options(verbs.method_of(method, "sparsify"), option or [], sparsify)
    result = verbs.sparsify(
        model, out=out, method=method, ppl=ppl or (), overwrite=overwrite, restart=restart, say=say,
        **others, **given, **more,
    )  # fmt: skip
    finish(result, json)
