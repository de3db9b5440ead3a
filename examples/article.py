"""The experiments of the article that this project started from, on real digits, with the table of results it lacks.

    python examples/article.py                    # a few minutes on two cores: prints the tables, writes article.png
    python examples/article.py --quick            # a short mode, to see that it runs
    python examples/article.py --write-docs       # also the page and its picture in docs/benchmarks/, and the results
    python examples/article.py --from-results --write-docs  # the page and the picture again, without the runs

The article trains an autoencoder on the mean squared error with SGD (learning rate 0.01, momentum 0.9) for 10 and for
20 epochs, and regularises the gradient first by L1 and then by a "dense", continuous formula. Against exploding
gradients it then recommends smaller learning rates, accumulation, more epochs, more varied data, and noise whose norm
is clamped to 1e-4. The article's code does not run; this program does, with these terms:


    in the article                         here
    L1-regularised gradient                `proximal_l1`: the penalty strength * sum |w|, with exact zeros
    dense regularised gradient             `dense_penalty`: strength / 2 * sum w^2, smooth everywhere
    one applied after the other            both at once: the order makes no difference to a sum of penalties
    its formulas, taken literally          `shrink_gradients("soft")`, then `("dense")`: rows below the table
    accumulation, noise, noise clamped     `accumulate`, `noise_injection`, `noise_injection(max_norm=1e-4)`

Everything runs under `guard` with a clip. All numbers of an arm are traced arguments, so one compiled function runs
every arm; a strength of 0 switches a part off.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

try:
    import flax
    import numpy as np
    import sklearn
    from article_report import ARTICLE, effects_table, main_table, more_table, picture, words
    from flax import nnx
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"{error}. The examples need more than the library: pip install '.[examples]'")

import jax
import jax.numpy as jnp
import optax
from jax.scipy.ndimage import map_coordinates

import optax_guard as og
from optax_guard.models import MLP
from optax_guard.smoothing import augment_with_noise

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "article.json"
DOCS = ROOT / "docs" / "benchmarks" / "article.md"
SIZES = (64, 96, 24, 96, 64)  # an MLP with a narrow middle is an autoencoder
TRAIN_IMAGES = 500  # few enough to overfit in 20 epochs; the other 1297 are held out
BATCH = 8
MOMENTUM = 0.9
MAX_NORM = 1.0
L1, DENSE = 1e-3, 1e-2  # at the initial weights both penalties are about 2.5, so that neither is favoured
EVERY = 4
ETA = 1e-3  # variance of the noise at the first step; by step 100 its norm is about that of the clip
CLAMP = 1e-4  # the article's bound on the norm of its noise
SHRINK = 1e-3  # a quarter of the root mean square of the gradient's elements once the loss has settled
INPUT_SIGMA = 0.5  # of the noise at test time, where images have variance 1
WEIGHT_SIGMA = 0.1  # the same on the weights, as a share of each kernel's root mean square
START = 0.5  # factor on the initial weights in the rows of a smaller start
LONG = 5  # times as many epochs, in two rows beyond the table
RATES = (0.01, 0.001, 0.1)  # the article's first
REGULARISATIONS = {"plain": (0.0, 0.0), "L1": (L1, 0.0), "dense": (0.0, DENSE), "L1 then dense": (L1, DENSE)}
EDGES = np.linspace(-6, 0.5, 53)  # of the histogram of log10 |w|


class Arm(NamedTuple):
    """The numbers of one way to train. All may be traced."""

    learning_rate: Any = 0.01
    l1: Any = 0.0  # strength of `proximal_l1`
    dense: Any = 0.0  # strength of `dense_penalty`
    every: Any = 1  # batches per step
    eta: Any = 0.0  # variance of the gradient noise at the first step
    noise_norm: Any = np.inf  # bound on its norm
    augmented: Any = False  # train on shifted and rotated images, new ones each epoch
    shrink_soft: Any = 0.0  # thresholds of the article's formulas on the gradient itself
    shrink_dense: Any = 0.0
    l1_subgradient: Any = 0.0  # strength of `l1_penalty`: the same penalty without exact zeros
    max_norm: Any = MAX_NORM
    start: Any = 1.0  # factor on the initial weights


class Data(NamedTuple):
    """What a seed determines."""

    params: Any
    train: jax.Array  # f32[images, 64]
    varied: jax.Array  # f32[epochs, images, 64]: the same images, shifted and rotated anew in each epoch
    heldout: jax.Array  # f32[others, 64]
    order: jax.Array  # i32[epochs, steps, BATCH]
    seed: jax.Array  # i32[]


def make_optimizer(arm: Arm, seed: jax.Array) -> optax.GradientTransformation:
    """Everything that the article recommends, as one optimizer."""
    inner = optax.chain(
        og.shrink_gradients(arm.shrink_soft),
        og.shrink_gradients(arm.shrink_dense, shrinkage="dense"),
        og.l1_penalty(arm.l1_subgradient),
        og.dense_penalty(arm.dense),
        og.noise_injection(arm.eta, key=jnp.stack([jnp.uint32(8), seed.astype(jnp.uint32)]), max_norm=arm.noise_norm),
        optax.sgd(arm.learning_rate, momentum=MOMENTUM),
    )
    inner = og.proximal_l1(inner, arm.l1, learning_rate=arm.learning_rate, momentum=MOMENTUM)
    guarded = og.guard(inner, og.clip_by_global_norm(arm.max_norm), recorder_rows=1)
    return og.accumulate(guarded, every=lambda _: arm.every)


def make_data(seed: int, epochs: int) -> tuple[Any, Data]:
    """The static part of the model, and the data: centred, and scaled to a mean square of 1."""
    rng = np.random.default_rng(seed)
    pixels = load_digits().images.astype(np.float32)
    pixels = pixels[rng.permutation(len(pixels))]
    varied = np.stack([vary(pixels[:TRAIN_IMAGES], rng) for _ in range(epochs)])
    flat = [x.reshape(*x.shape[:-2], 64) for x in (pixels[:TRAIN_IMAGES], varied, pixels[TRAIN_IMAGES:])]
    mean = flat[0].mean(axis=0)
    scale = np.sqrt(np.mean(np.square(flat[0] - mean)))
    steps = TRAIN_IMAGES // BATCH
    order = np.stack([rng.permutation(TRAIN_IMAGES)[: steps * BATCH].reshape(steps, BATCH) for _ in range(epochs)])
    graph, params = nnx.split(MLP(SIZES, rngs=nnx.Rngs(seed)))
    images = [jnp.asarray((x - mean) / scale) for x in flat]
    return graph, Data(nnx.to_pure_dict(params), *images, order=jnp.asarray(order), seed=jnp.asarray(seed))


def vary(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image [8, 8] rotated by up to 10 degrees and shifted by up to half a pixel."""
    angle = rng.uniform(-np.pi / 18, np.pi / 18, len(images)).astype(np.float32)[:, None, None]
    shift = rng.uniform(-0.5, 0.5, (2, len(images), 1, 1)).astype(np.float32)
    row, column = np.mgrid[:8, :8].astype(np.float32)[:, None] - np.float32(3.5)
    rows = np.cos(angle) * row - np.sin(angle) * column + shift[0] + np.float32(3.5)
    columns = np.sin(angle) * row + np.cos(angle) * column + shift[1] + np.float32(3.5)
    return np.asarray(interpolated(images, rows, columns))


@jax.jit
@jax.vmap
def interpolated(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The image interpolated at points between its pixels."""
    return map_coordinates(image, (rows, columns), order=1)


def make_run(graph: Any) -> Callable[[Arm, Data], dict[str, jax.Array]]:
    """One training and its tests, compiled once for all arms."""

    def loss_fn(params: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))
        return jnp.mean(jnp.square(model(images) - targets))

    def run(arm: Arm, data: Data) -> dict[str, jax.Array]:
        tx = make_optimizer(arm, data.seed)

        def epoch(carry: Any, batches: Any) -> Any:
            images = jnp.where(arm.augmented, batches[0], data.train)

            def step(carry: Any, index: jax.Array) -> Any:
                params, state = carry
                batch = images[index]
                loss, grads = jax.value_and_grad(loss_fn)(params, batch, batch)
                params, state = og.apply_gradients(tx, grads, state, params, value=loss)
                return (params, state), (loss, og.metrics(state)["guard/grad_norm"])

            carry, (losses, norms) = jax.lax.scan(step, carry, batches[1])
            ends = [loss_fn(carry[0], x, x) for x in (data.train, data.heldout)]
            return carry, (jnp.mean(losses), *ends, jnp.max(norms))

        params = jax.tree.map(lambda x: x * arm.start, data.params)
        carry = (params, tx.init(params))
        (params, state), curves = jax.lax.scan(epoch, carry, (data.varied, data.order))
        seen = og.metrics(state)
        half = len(data.order) // 2 - 1
        return {
            **robustness(loss_fn, params, data),
            "train_loss": curves[1][-1],
            "heldout_loss": curves[2][-1],
            "train_loss_halfway": curves[1][half],
            "heldout_loss_halfway": curves[2][half],
            "largest_gradient_norm": jnp.max(curves[3]),
            "steps": seen["guard/step"],
            "steps_clipped": seen["guard/clipped_total"],
            "steps_skipped": seen["guard/skipped_total"],
            "exact_zeros": og.sparsity([x for x in jax.tree.leaves(params) if x.ndim > 1]).total_share,  # of kernels
            "epoch_loss": curves[0],
            "train_curve": curves[1],
            "heldout_curve": curves[2],
            "weights_histogram": histogram(params),
        }

    return jax.jit(run)


def robustness(loss_fn: Callable[..., jax.Array], params: Any, data: Data) -> dict[str, jax.Array]:
    """The loss on held-out images, to be restored from noise on the image, the article's noise, noisy weights."""
    key = jax.random.key(data.seed)
    noisy = augment_with_noise(data.heldout, INPUT_SIGMA, key=key)
    noise = noisy - data.heldout
    clamped = noise * jnp.minimum(1, CLAMP / jnp.linalg.norm(noise, axis=-1, keepdims=True))
    noisy_weights = og.perturb_weights(loss_fn, WEIGHT_SIGMA, relative_to="weights")
    return {
        "input_noise_loss": loss_fn(params, noisy, data.heldout),
        "clamped_noise_loss": loss_fn(params, data.heldout + clamped, data.heldout),
        "weight_noise_loss": noisy_weights(params, data.heldout, data.heldout, noise_key=key),
    }


def histogram(params: Any) -> jax.Array:
    """How many weights are exactly zero, and how many fall between `EDGES`; biases left out."""
    weights = jnp.abs(jnp.concatenate([x.ravel() for x in jax.tree.leaves(params) if x.ndim > 1]))
    logs = jnp.log10(jnp.where(weights > 0, weights, 1))
    inside = jnp.sum(
        (jnp.digitize(logs, EDGES)[:, None] == jnp.arange(len(EDGES) + 1)) & (weights > 0)[:, None], axis=0
    )
    return jnp.concatenate([jnp.sum(weights == 0, keepdims=True), inside])


def make_arms(quick: bool) -> list[tuple[dict[str, Any], Arm]]:
    """The table's 96 arms with their names, and the rows beyond it; a few of both for the quick mode."""
    switches = (False,) if quick else (False, True)
    arms = []
    for name, rate, accumulated, noisy, augmented in itertools.product(
        REGULARISATIONS, RATES[:1] if quick else RATES, (False, True), switches, switches
    ):
        l1, dense = REGULARISATIONS[name]
        label = {"regularisation": name, "learning_rate": rate}
        label |= {"accumulation": accumulated, "noise": noisy, "augmented": augmented}
        arms.append((label, Arm(rate, l1, dense, EVERY if accumulated else 1, ETA * noisy, np.inf, augmented)))
    more = {
        "shrink, soft": Arm(shrink_soft=SHRINK),
        "shrink, dense": Arm(shrink_dense=SHRINK),
        "shrink, soft then dense": Arm(shrink_soft=SHRINK, shrink_dense=SHRINK),
        "L1 in the gradient": Arm(l1_subgradient=L1),
        f"noise of norm {CLAMP:g}": Arm(eta=ETA, noise_norm=CLAMP),
        "no clip": Arm(max_norm=np.inf),
        "no clip, rate 0.1": Arm(0.1, max_norm=np.inf),
        "longer": Arm(),
        "longer, varied data": Arm(augmented=True),
    }
    for factor in (0.1, 0.3, 3.0):
        more |= {f"L1 x {factor:g}": Arm(l1=L1 * factor), f"dense x {factor:g}": Arm(dense=DENSE * factor)}
    rows = [({"more": name}, arm) for name, arm in more.items()]
    changes = [{"regularisation": x} for x in REGULARISATIONS] + [{"learning_rate": 0.001}]
    changes += [{name: True} for name in ("accumulation", "noise", "augmented")]
    smaller = [(label, arm._replace(start=START)) for label, arm in arms if label in [ARTICLE | x for x in changes]]
    return arms + (rows[:5] if quick else rows + [({"more": "smaller start"} | label, arm) for label, arm in smaller])


def run_all(seeds: int, epochs: int, quick: bool, console: Console) -> dict[str, Any]:
    """Runs every arm for every seed on two threads; returns what goes into the results file."""
    start = time.perf_counter()
    arms = make_arms(quick)
    graph = make_data(0, 1)[0]
    data = [make_data(seed, epochs)[1] for seed in range(seeds)]
    longer = [] if quick else [make_data(seed, LONG * epochs)[1] for seed in range(seeds)]
    run = make_run(graph)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[tuple[int, int], Any] = {}
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(max_workers=2) as pool:
        task = progress.add_task("compiling", total=len(arms) * seeds)
        typed = [Arm(*(jnp.asarray(x, jnp.result_type(type(x))) for x in arm)) for _, arm in arms]
        results[0, 0] = jax.device_get(run(typed[0], data[0]))
        progress.update(task, advance=1, description="training")
        programme(results[0, 0]["epoch_loss"], progress.console)
        jobs = {
            pool.submit(lambda arm, part: jax.device_get(run(arm, part)), arm, part): (i, seed)
            for i, ((label, _), arm) in enumerate(zip(arms, typed, strict=True))
            for seed, part in enumerate(longer if label.get("more", "").startswith("longer") else data)
            if (i, seed) != (0, 0)
        }
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            progress.advance(task)
    rows = []
    for i, (label, _) in enumerate(arms):
        by_seed = [results[i, seed] for seed in range(seeds)]
        row = {name: [rounded(each[name]) for each in by_seed] for name in by_seed[0]}
        if label | {"regularisation": "plain"} != ARTICLE:  # curves of all arms would be most of the file
            row = {name: values for name, values in row.items() if not isinstance(values[0], list)}
        rows.append(label | row)
    sizes = [int(x.size) for x in jax.tree.leaves(data[0].params)]
    packages = {"jax": jax, "optax": optax, "flax": flax, "numpy": np, "scikit-learn": sklearn, "optax_guard": og}
    return {
        "options": {
            "seeds": list(range(seeds)),
            "epochs": epochs,
            "longer": LONG * epochs,
            "start": START,
            "quick": quick,
            "sizes": SIZES,
            "parameters": sum(sizes),
            "train_images": TRAIN_IMAGES,
            "heldout_images": len(data[0].heldout),
            "batch": BATCH,
            "momentum": MOMENTUM,
            "max_norm": MAX_NORM,
            "l1": L1,
            "dense": DENSE,
            "every": EVERY,
            "eta": ETA,
            "clamp": CLAMP,
            "shrink": SHRINK,
            "input_sigma": INPUT_SIGMA,
            "weight_sigma": WEIGHT_SIGMA,
            "histogram_edges": [rounded(x) for x in EDGES],
        },
        "versions": {name: module.__version__ for name, module in packages.items()}
        | {"python": platform.python_version()},
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def programme(epoch_loss: np.ndarray, console: Console) -> None:
    """The article's own output: half of the epochs, then all."""
    half = len(epoch_loss) // 2
    console.print(f"SGD, learning rate {RATES[0]}, momentum {MOMENTUM}: {half} epochs")
    for epoch, loss in enumerate(epoch_loss, start=1):
        if epoch == half + 1:
            console.print(f"continuing to epoch {len(epoch_loss)}")
        console.print("Epoch: %d, Loss: %.4f" % (epoch, loss), highlight=False)  # noqa: UP031 (the article's format)


def rounded(values: Any) -> Any:
    """Numbers or lists of them with five digits: enough to plot, few enough to read in a diff."""
    if np.ndim(values):
        return [rounded(x) for x in values]
    return int(values) if np.issubdtype(np.asarray(values).dtype, np.integer) else float(f"{float(values):.5g}")


def to_json(results: dict[str, Any]) -> str:
    """One line per row."""
    head = {name: value for name, value in results.items() if name != "rows"}
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    return json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + rows + "\n]}\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the article's programme and the table, prints both, and writes the picture and any other requested file."""
    parser = argparse.ArgumentParser(description="The article's programme on real digits, and 96 variations of it.")
    parser.add_argument("--epochs", type=int, default=20, help="the article's second number (default: 20)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per arm (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="8 arms and 5 rows, 4 epochs, one seed: to see that it runs"
    )
    parser.add_argument("--all", action="store_true", help="print all 96 rows")
    parser.add_argument("--out", type=Path, help="the picture (default: article.png)")
    parser.add_argument("--results", type=Path, help="also write all numbers to this JSON file")
    parser.add_argument("--from-results", action="store_true", help=f"read {RESULTS.relative_to(ROOT)}; train nothing")
    parser.add_argument("--write-docs", action="store_true", help="write the page, its picture and the results")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2")
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.write_docs and options.quick:
        parser.error("--write-docs needs the full run, not --quick")
    out = options.out or (DOCS.with_suffix(".png") if options.write_docs else Path("article.png"))
    for path in (out, options.results):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.from_results:
        results = json.loads(RESULTS.read_text())
    else:
        seeds, epochs = (1, 4) if options.quick else (options.seeds, options.epochs)
        results = run_all(seeds, epochs, options.quick, console)
    console.print(main_table(results, everything=options.all))
    if not results["options"]["quick"]:
        console.print(effects_table(results))
    console.print(more_table(results))
    picture(results, out)
    if options.write_docs:
        DOCS.write_text(words(results))
    for path in {options.results, RESULTS if options.write_docs and not options.from_results else None} - {None}:
        path.write_text(to_json(results))
    console.print(f"{results['seconds']} s. Picture: {out}")


if __name__ == "__main__":
    main()
