"""What it costs: one JSON object a command.

    uv run python scripts/benchmark.py data > data/benchmarks/cache.json
    uv run python scripts/benchmark.py data --records 1000000 > data/benchmarks/scale.json    (benchmark_scale.py says what)
    uv run python scripts/benchmark.py data --loading --before CHECKOUT > data/benchmarks/loading.json    (benchmark_loading.py)

`data`: samples a second from the cache on disk, against `torch.load(weights_only=True)` of one `.pt` a sample that holds
the same tensors, and against decoding and encoding. A sample is its latents, prompt and pooled embeddings and phrases;
batches of 8 are stacked in every case. Of the embedded base, phrases repeat and are read once, captions and latents each
time. Files lie in the page cache: what is compared is the way, not the disk. "first" reads verify every checksum, as each
entry's first read in a process does; "again" is the same process later; "memory" is what training does from its second
epoch on, where the encodings fit into memory. Rounds of the cases take turns; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.config.ranges import COUNT

BATCH, ROUNDS = 8, 5
IMAGES = 256  # of the embedded base
LARGE = {
    "latents": (16, 128, 128),
    "embeds": (1, 333, 4096),
    "pooled": (1, 2048),
}  # SD3 at 1024 pixels with 77 + 256 tokens
LARGE_SAMPLES, LARGE_PHRASES, PHRASE = 48, 4, (1, 2048)
# The VAE of stabilityai/stable-diffusion-3-medium-diffusers (vae/config.json), its weights random.
LARGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
LARGE_VAE_SIDE = 512  # a quarter of the pixels of 1024: what is reported is a lower bound

Sample = dict[str, Any]


def rate(fetch: Callable[[int], Sample], count: int) -> float:
    """Samples a second of a pass over all samples in batches."""
    import torch

    start = time.perf_counter()
    for first in range(0, count, BATCH):
        samples = [fetch(index) for index in range(first, min(first + BATCH, count))]
        for name in ("latents", "embeds", "pooled"):
            torch.stack([sample[name] for sample in samples])
    return count / (time.perf_counter() - start)


def in_turns(cases: dict[str, Callable[[], float]]) -> dict[str, tuple[float, list[float]]]:
    """case -> median of `ROUNDS` rates, and all of them; the cases take turns, so that all see the same machine."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            rates[name].append(case())
    return {name: (statistics.median(each), [round(r, 1) for r in each]) for name, each in rates.items()}


def compared(rates: dict[str, tuple[float, list[float]]]) -> dict[str, Any]:
    cached = {name: value for name, (value, _) in rates.items() if name.startswith(("cache", "from_memory"))}
    out: dict[str, Any] = {
        "samples_per_s": {name: round(value, 4 if value < 1 else 1) for name, (value, _) in rates.items()}
    }
    out["all_rounds"] = {name: each for name, (_, each) in rates.items()}
    for other in ("torch_load", "decode_and_encode"):
        if other in rates:
            out[f"times_{other}"] = {name: round(value / rates[other][0], 1) for name, value in cached.items()}
    return out


def embedded(work: Path) -> dict[str, Any]:
    """The embedded base at its own 64 pixels, through the classes that `train` uses."""
    import torch

    from mmdit_lora.config.loading import Config
    from mmdit_lora.data.buckets import one_size
    from mmdit_lora.data.cache import EncodingCache
    from mmdit_lora.data.shapes import DOMAINS, write_dataset
    from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
    from mmdit_lora.training.fill_cache import fill_cache
    from mmdit_lora.training.trainer import prepare_run

    base = Path(__file__).resolve().parent.parent / "data" / "tiny_base"
    write_dataset(work / "data", DOMAINS["basic"], count=IMAGES, seed=0)
    values = {
        "base": str(base),
        "output_dir": str(work / "run"),
        "data": {"path": str(work / "data"), "validation_share": 0.0, "cache": str(work / "cache")},
        "train": {"batch_size": BATCH},
    }
    config = Config.model_validate(values)
    start = time.perf_counter()
    fill_cache(config, EncodingCache(work / "cache"))
    fill_s = time.perf_counter() - start
    start = time.perf_counter()
    run = prepare_run(config)
    run.examples.batch(range(BATCH))
    first_batch_s = time.perf_counter() - start

    pipe, records, size = run.pipe, run.examples.records, run.examples.size_of(0)

    def source(cached: bool, **options: Any) -> EncodedDataset:
        cache = EncodingCache(work / "cache" if cached else None, **options)
        return EncodedDataset(records, LayoutEncoder(pipe, cache, base=str(base)), config, buckets=one_size(size))

    def fetch_from(dataset: EncodedDataset) -> Callable[[int], Sample]:
        """What is read of the cache for a sample."""

        def fetch(index: int) -> Sample:
            view, layout = dataset.cached_view(index, 0), records[index].layout
            assert view is not None
            texts = dataset.encoder.prompts([layout.caption])
            phrases = dataset.encoder.phrases([box.phrase for box in layout.boxes])
            return {**view.tensors, **texts, "phrases": torch.stack(list(phrases.values()))}

        return fetch

    def epoch(dataset: EncodedDataset) -> float:
        return rate(fetch_from(dataset), IMAGES)

    def first_read() -> float:
        dataset = source(True)
        dataset.encoder.prompts([""])  # the hashes of the base's files are read once a process
        return epoch(dataset)

    again, memory = source(True, max_bytes=0), source(True)
    for index in range(IMAGES):
        torch.save(fetch_from(memory)(index), work / f"{index}.pt")
    epoch(again)
    rates = in_turns(
        {
            "cache_first": first_read,
            "cache_again": lambda: epoch(again),
            "cache_memory": lambda: epoch(memory),
            "torch_load": lambda: rate(lambda i: torch.load(work / f"{i}.pt", weights_only=True), IMAGES),
        }
    )
    start = time.perf_counter()
    uncached = source(False)
    for first in range(0, IMAGES, BATCH):
        uncached.batch(range(first, first + BATCH))
    slow = IMAGES / (time.perf_counter() - start)
    rates["decode_and_encode"] = (slow, [round(slow, 1)])
    sample_bytes = (work / "0.pt").stat().st_size
    return {
        "images": IMAGES,
        "pt_bytes": sample_bytes,
        **compared(rates),
        "fill_s_with_opening_the_base": round(fill_s, 2),
        "first_batch_s_with_opening_the_base": round(first_batch_s, 2),
    }


def large(work: Path, *, with_vae: bool) -> dict[str, Any]:
    """Entries of a real size with random values; decoding and encoding is one image through a VAE of the real size."""
    import torch
    from PIL import Image

    from mmdit_lora.data.cache import LATENTS, PHRASES, PROMPTS, EncodingCache, Entry, content_key
    from mmdit_lora.data.images import load_image
    from mmdit_lora.data.transforms import prepare
    from mmdit_lora.layout import Layout

    cache = EncodingCache(work / "cache")
    generator = torch.Generator().manual_seed(0)
    keys = [content_key("large", index) for index in range(LARGE_SAMPLES)]

    def random(shape: Sequence[int], dtype: Any) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    for index, key in enumerate(keys):
        latents = random(LARGE["latents"], torch.float32)
        embeds, pooled = (random(LARGE[name], torch.bfloat16) for name in ("embeds", "pooled"))
        phrases = [random(PHRASE, torch.bfloat16) for _ in range(LARGE_PHRASES)]
        cache.write(LATENTS, key, Entry({"latents": latents}))
        cache.write(PROMPTS, key, Entry({"embeds": embeds, "pooled": pooled}))
        for number, phrase in enumerate(phrases):
            cache.write(PHRASES, content_key(key, number), Entry({"embeds": phrase}))
        whole = {"latents": latents, "embeds": embeds, "pooled": pooled, "phrases": torch.cat(phrases)}
        torch.save(whole, work / f"{index}.pt")

    def fetch_from(cache: EncodingCache) -> Callable[[int], Sample]:
        def fetch(index: int) -> Sample:
            key = keys[index]
            latents, prompt = cache.read(LATENTS, key), cache.read(PROMPTS, key)
            phrases = [cache.read(PHRASES, content_key(key, number)) for number in range(LARGE_PHRASES)]
            assert latents is not None
            assert prompt is not None
            return {**latents.tensors, **prompt.tensors, "phrases": phrases}

        return fetch

    again = fetch_from(cache)
    rate(again, LARGE_SAMPLES)
    held = [torch.load(work / f"{index}.pt", weights_only=True) for index in range(LARGE_SAMPLES)]
    rates = in_turns(
        {
            "cache_first": lambda: rate(fetch_from(EncodingCache(work / "cache")), LARGE_SAMPLES),
            "cache_again": lambda: rate(again, LARGE_SAMPLES),
            "torch_load": lambda: rate(lambda i: torch.load(work / f"{i}.pt", weights_only=True), LARGE_SAMPLES),
            # No file at all: what the batch's own copy allows, whatever stands before it.
            "from_memory": lambda: rate(lambda i: held[i], LARGE_SAMPLES),
        }
    )
    report: dict[str, Any] = {
        "samples": LARGE_SAMPLES,
        "shapes": {name: list(shape) for name, shape in LARGE.items()} | {"phrases": [LARGE_PHRASES, PHRASE[-1]]},
        "dtypes": "latents float32, texts bfloat16",
        "pt_bytes": (work / "0.pt").stat().st_size,
    }
    if with_vae:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL(**LARGE_VAE).eval()
        side = LARGE_VAE_SIDE
        noise = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(work / "image.png")
        start = time.perf_counter()
        pixels, _ = prepare(load_image(work / "image.png"), Layout(caption="", boxes=[]), (side, side))
        with torch.no_grad():
            vae.encode(pixels[None]).latent_dist.mode()
        seconds = time.perf_counter() - start
        rates["decode_and_encode"] = (1 / seconds, [round(1 / seconds, 4)])
        report["decode_and_encode_is"] = f"one image of {side} x {side} pixels, no text: an upper bound of the rate"
    return report | compared(rates)


def data(*, with_vae: bool) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    imported = time.perf_counter()
    import mmdit_lora.training.trainer  # noqa: F401 - how long that takes

    import_s = time.perf_counter() - imported
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        return {
            "command": "OMP_NUM_THREADS=1 uv run python scripts/benchmark.py data > data/benchmarks/cache.json",
            "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "batch_size": BATCH,
            "import_s": round(import_s, 2),
            "embedded_base_64_px": embedded(Path(one)),
            "large": large(Path(two), with_vae=with_vae),
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("data", help="the cache against torch.load and against decoding and encoding")
    verb.add_argument("--no-vae", action="store_true", help="leave the real-size VAE away (half a minute on a core)")
    verb.add_argument("--json", action="store_true", help="print one JSON object; without, an indented one")
    verb.add_argument(
        "--records", type=COUNT.parse, help="instead: what so many records in tar shards cost (benchmark_scale.py)"
    )
    verb.add_argument(
        "--loading",
        action="store_true",
        help="instead: images on disk by 0, 1, 2 workers, and captions (benchmark_loading.py)",
    )
    verb.add_argument(
        "--before", type=Path, help="with --loading: a checkout of an earlier version, in turns with this one"
    )
    verb = verbs.add_parser("train", help="a training step, and what a run spends beside it")
    verb.add_argument("--size", choices=("tiny", "small", "sd3-medium"), default="small")
    verb.add_argument("--peer", type=Path, help="CreatiLayout's checkout: its class beside ours, in turns")
    verb.add_argument("--json", action="store_true", help="print one JSON object; without, an indented one")
    arguments = parser.parse_args(argv)
    if arguments.verb == "train":
        from benchmark_train import train_benchmark

        report = train_benchmark(arguments.size, arguments.peer)
    elif arguments.loading:
        from benchmark_loading import loading

        report = loading(arguments.before)
    elif arguments.records is not None:
        from benchmark_scale import scale

        report = scale(arguments.records)
    else:
        report = data(with_vae=not arguments.no_vae)
    json.dump(report, sys.stdout, indent=None if arguments.json else 2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
