"""The published comparisons of flows: train, evaluate, publish.

    python -m evals.studies.flows toy2d digits patches audio speech latent [--jobs 2] [--root runs/flows] [--publish]

A study is a list of ordinary runs, each a configuration with overrides under one protocol. Runs that are finished are
not trained again, so the same command continues a study. `--publish` copies results to evals/results/, from which
`python -m evals.leaderboard` makes the board; densities and the cost of sharing are drawn by `evals.density` and
`evals.studies.sharing`.
"""

from collections.abc import Callable, Iterator

from genmodels.config import read

from .plans import ROOT, Plan, main

PLANES = ("checkerboard", "moons")
BUDGET = "train.steps=1000"  # of the many runs that compare ways of sharing
DEPTHS = (4, 8, 16)
VARIANTS = {  # of one network for all steps: what differs from the configuration, at its place
    "naive": {"embedding": 0, "inject": "[]", "projection": "shared"},
    "decomp": {"embedding": 0, "inject": "[]"},
    "nanoflow": {},
}


def sharing(config: str, layer: str, variant: str) -> tuple[str, ...]:
    """Overrides that give the `shared` network at `layer` of a configuration another variant, or the steps a network
    each ("unshared")."""
    place = f"{layer}.network"
    if variant != "unshared":
        return tuple(f"{place}.{key}={value}" for key, value in VARIANTS[variant].items())
    node = read(ROOT / "configs" / f"{config}.yaml")
    for key in place.replace("]", "").replace("[", ".").split("."):
        node = node[int(key) if key.isdigit() else key]
    inner = ", ".join(f"{key}: {value}" for key, value in node["of"].items())
    return (f"{place}={{{inner}}}",)


def toy2d() -> Iterator[Plan]:
    """Four deep flows of the plane, with networks of their own or shared, on two densities."""
    layers = {"nsf": 1, "nsf_ar": 1, "maf": 2, "realnvp": 2}
    for plane in PLANES:
        for flow, index in layers.items():
            for variant in ("unshared", *VARIANTS):
                config = f"toy2d/nanoflow_{flow}"
                own = sharing(config, f"model.layers[0].layers[{index}]", variant)
                yield Plan(f"{plane}-{flow}-{variant}", config, plane, (f"data={plane}", BUDGET, *own))


def digits() -> Iterator[Plan]:
    """Class-conditional flows of digits: of vectors and of images, and couplings shared at three depths."""
    for flow in ("nsf", "nsf_ar", "maf", "realnvp", "nsf_image", "glow"):
        yield Plan(f"digits-{flow}", f"digits/{flow}", "digits")
    yield from depths("digits-nsf", "digits/nanoflow", "digits", "model.layers[1]")
    yield from depths("digits-affine", "digits/nanoflow_affine", "digits", "model.layers[1]")


def patches() -> Iterator[Plan]:
    """Flows of natural patches: couplings, autoregressive layers, and couplings shared at three depths."""
    yield from depths("patches-nsf", "patches/nanoflow", "natural_patches", "model.layers[0]")
    yield Plan("patches-nsf_ar", "patches/nsf_ar", "natural_patches", (BUDGET,))


def depths(name: str, config: str, protocol: str, repeat: str) -> Iterator[Plan]:
    """Couplings, the third layer of a repeated step, at three depths with networks of their own and shared ones."""
    for depth in DEPTHS:
        for variant in ("unshared", *VARIANTS):
            own = sharing(config, f"{repeat}.layers[2]", variant)
            yield Plan(f"{name}-k{depth}-{variant}", config, protocol, (f"{repeat}.count={depth}", BUDGET, *own))


def audio() -> Iterator[Plan]:
    """WaveFlow and NanoFlow on synthesised notes, and WaveFlow given their spectrograms."""
    for flow, protocol in (("waveflow", "tones"), ("nanoflow", "tones"), ("waveflow_mel", "tones_mel")):
        yield Plan(f"tones-{flow}", f"audio/{flow}", protocol)


def speech() -> Iterator[Plan]:
    """WaveFlow and NanoFlow on synthesised speech, which `python -m evals.speech runs/speech` makes first."""
    data = "data={name: wav_folder, path: runs/speech, segment: 2048}"
    for flow in ("waveflow", "nanoflow"):
        yield Plan(f"speech-{flow}", f"audio/{flow}", "speech", (data, "train.batch_size=8"))


def latent() -> Iterator[Plan]:
    """Digits in black and white: autoencoders with Gaussian and flow laws of the latent, NADE and MADE."""
    for model in ("vae", "vae_nsf", "nade", "made"):
        yield Plan(f"binary-{model}", f"digits/{model}", "binary_digits")


STUDIES: dict[str, Callable[[], Iterator[Plan]]] = {
    f.__name__: f for f in (toy2d, digits, patches, audio, speech, latent)
}


if __name__ == "__main__":
    main(__doc__, STUDIES, "runs/flows")
