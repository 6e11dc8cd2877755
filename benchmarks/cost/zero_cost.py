"""What does a regularized step cost under ZeRO, compared with two backward passes and one engine step?

    python -m benchmarks.cost.zero_cost     # stages 1, 2 and 3, fp32 and bf16, two CPU processes over gloo

Measured on every rank; only the seconds differ between ranks:

- ``kept``         bytes in use when the second pass begins, beyond those in use when the first pass begins,
                   per parameter. Plain DeepSpeed keeps nothing between two windows, so regularization adds
                   these bytes.
- ``collectives``  calls and bytes of a regularized step, minus twice those of a window and once those of
                   the engine's step
- ``seconds``      a regularized step against two windows and one engine step, timed in turn on an engine of
                   each kind
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from benchmarks.common.arguments import add_output, at_least
from benchmarks.common.results import stamp, todays, write_both
from benchmarks.common.tables import markdown_table
from benchmarks.cost.listening import Listener, bytes_alive
from benchmarks.cost.measuring import keep_freed_memory, quartiles
from benchmarks.cost.transformer import VOCABULARY, Transformer, parameter_count


def make_engine(args: argparse.Namespace, stage: int, precision: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = Transformer(layers=args.layers, width=args.width, length=args.length)
    # As with a large model, the bucket holds the largest gradient, and norms and biases are persistent.
    sharding = {"stage3_param_persistence_threshold": 4 * args.width + 1, "reduce_bucket_size": 2**20}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **sharding},
        "zero_allow_untested_optimizer": True,
    }
    if precision == "bfloat16":  # gloo sums no half precision
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def measure(args: argparse.Namespace, stage: int, precision: str, listener: Listener) -> dict[str, Any]:
    """The figures of one stage and precision on this rank."""
    from gradreg_optim import ZeroGradRegOptimizer

    plain = make_engine(args, stage, precision)
    regularized = make_engine(args, stage, precision)
    optimizer = ZeroGradRegOptimizer(regularized, strength=1e-3, eps=1e-3)
    draw = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(VOCABULARY, (args.batch, args.length), generator=draw)
    alive: list[int] = []
    counting_memory = False

    def closure() -> torch.Tensor:
        if counting_memory:
            alive.append(bytes_alive())
        loss = regularized(tokens)
        regularized.backward(loss)
        regularized.step()
        return loss

    seconds: dict[str, list[float]] = {"window": [], "step": [], "regularized": []}
    counts: dict[str, Counter[str]] = {}
    rounds = range(args.rounds + args.warmup)
    for round_number in tqdm(rounds, f"{precision}, stage {stage}", leave=False, disable=dist.get_rank() > 0):
        dist.barrier()
        listener.since_last()
        times = [time.perf_counter()]
        plain.backward(plain(tokens))
        times.append(time.perf_counter())
        counts["window"] = listener.since_last()
        plain.step()
        times.append(time.perf_counter())
        counts["step"] = listener.since_last()
        dist.barrier()
        times.append(time.perf_counter())
        optimizer.step(closure)
        times.append(time.perf_counter())
        counts["regularized"] = listener.since_last()
        if round_number >= args.warmup:
            for name, start in zip(seconds, (0, 1, 3), strict=True):
                seconds[name].append(times[start + 1] - times[start])
    counting_memory = True
    optimizer.step(closure)
    names = sorted({name for count in counts.values() for name in count})
    window, step, whole = (counts[part] for part in ("window", "step", "regularized"))
    extra = {name: whole[name] - 2 * window[name] - step[name] for name in names}
    zero = regularized.optimizer
    persistent = sum(p.ds_numel for p in zero.persistent_parameters) if stage == 3 else 0
    found = {
        "kept_bytes": alive[1] - alive[0],
        "extra_collectives": {name: value for name, value in extra.items() if value},
        "collectives": {part: dict(count) for part, count in counts.items()},
        "persistent_parameters": persistent,
        "seconds": seconds,
    }
    plain.destroy()
    regularized.destroy()
    return found


def work(rank: int, args: argparse.Namespace, port: int, file: Path) -> None:
    """Measure all cases on one rank; rank 0 writes the figures of all ranks to ``file``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.ranks)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    listener = Listener()  # before DeepSpeed is imported, which keeps references
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    found = {}
    for precision in args.precisions:
        for stage in args.stages:
            ranks: list[Any] = [None] * args.ranks
            dist.all_gather_object(ranks, measure(args, stage, precision, listener))
            found[f"{precision} stage {stage}"] = ranks
    if rank == 0:
        file.write_text(json.dumps(found))
    dist.destroy_process_group()


def described(extra: dict[str, int], parameters: int) -> str:
    """The collectives in words; bytes per parameter where they grow with the model."""
    parts = []
    for name in sorted({key.rsplit(" ", 1)[0] for key in extra}):
        calls, size = extra.get(f"{name} calls", 0), extra.get(f"{name} bytes", 0)
        words = f"{size} bytes" if size < 1024 else f"{size / parameters:.3f} B/parameter"
        parts.append(f"{calls} {name} of {words}")
    return ", ".join(parts) or "none"


def summarise(found: dict[str, list[Any]], parameters: int, ranks: int) -> list[dict[str, Any]]:
    """The rows of the table. ``floor`` is two windows and one engine step."""
    rows = []
    for case, on_ranks in found.items():
        seconds = on_ranks[0]["seconds"]
        floor = [2 * window + step for window, step in zip(seconds["window"], seconds["step"], strict=True)]
        ratios = [own / least for own, least in zip(seconds["regularized"], floor, strict=True)]
        low, median, high = quartiles(ratios)
        kept = max(rank["kept_bytes"] for rank in on_ranks) / parameters
        rows.append(
            {
                "case": case,
                "kept_bytes_per_parameter": kept,
                "kept_times_ranks": kept * ranks,
                "extra": described(on_ranks[0]["extra_collectives"], parameters),
                "floor_seconds": statistics.median(floor),
                "seconds": statistics.median(seconds["regularized"]),
                "to_floor": median,
                "to_floor_low": low,
                "to_floor_high": high,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], stamped: dict[str, str], parameters: int, ranks: int) -> str:
    """The document."""
    lines = [
        "# Cost of a regularized step under ZeRO",
        "",
        f"{parameters / 1e6:.2f} M parameters on {ranks} ranks, accumulation 1. Kept: bytes beyond plain "
        "DeepSpeed while the second pass runs, per parameter, on the rank that keeps most; in brackets times "
        "the number of ranks. Collectives and time: beyond two windows and one engine step, and relative to "
        "them; median and quartiles.",
        "",
        *(f"- {name}: {value}" for name, value in stamped.items()),
        "",
    ]
    cells = [
        [
            row["case"],
            f"{row['kept_bytes_per_parameter']:.2f} ({row['kept_times_ranks']:.2f}/N)",
            row["extra"],
            f"{row['seconds']:.3f}",
            f"{row['to_floor']:.3f} ({row['to_floor_low']:.3f} to {row['to_floor_high']:.3f})",
        ]
        for row in rows
    ]
    head = ["case", "kept", "collectives", "seconds", "relative time"]
    return "\n".join(lines + markdown_table(head, cells)) + "\n"


def in_words(rows: list[dict[str, Any]]) -> str:
    """The range of the relative times, in words."""
    ratios = [row["to_floor"] for row in rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f} ×"


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--precisions", nargs="+", default=dtypes, choices=dtypes)
    parser.add_argument("--ranks", type=at_least(1), default=2)
    parser.add_argument("--layers", type=at_least(1), default=6)
    parser.add_argument("--width", type=at_least(64, multiple_of=64), default=192, help="a multiple of 64")
    parser.add_argument("--batch", type=at_least(1), default=4, help="sequences on a rank")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens in a sequence")
    parser.add_argument("--rounds", type=at_least(1), default=10)
    parser.add_argument("--warmup", type=at_least(0), default=4, help="uncounted rounds; ZeRO-3 needs two")
    parser.add_argument("--quick", action="store_true", help="a tiny model, three rounds")
    add_output(parser, "zero-cost")
    args = parser.parse_args(given)
    if args.quick:
        args.layers, args.width, args.batch, args.length, args.rounds = 1, 64, 2, 32, 3
    args.output = args.output or todays("zero-cost", quick=args.quick)
    return args


def run(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The figures of each rank, by precision and stage. The ranks are processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        try:
            mp.spawn(work, args=(args, port, file), nprocs=args.ranks)
        finally:
            # DeepSpeed leaves 70 MB a rank, in memory.
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                left.unlink(missing_ok=True)
        return json.loads(file.read_text())


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    found = run(args)
    parameters = parameter_count(layers=args.layers, width=args.width)
    rows = summarise(found, parameters, args.ranks)
    stamped = {
        **stamp(),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a rank, gloo",
        "load": f"{os.getloadavg()[0]:.1f} processes at the end, {args.ranks} of them these",
        "versions": f"{stamp()['versions']}, deepspeed {version('deepspeed')}",
    }
    table = markdown(rows, stamped, parameters, args.ranks)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"stamp": stamped, "settings": settings, "parameters": parameters, "rows": rows, "ranks": found}
    write_both(args.output, report, table)
    print(table)


if __name__ == "__main__":
    main()
