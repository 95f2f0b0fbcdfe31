"""Pipelines of diffusers as editors: loading them, and the settings that papers and their authors' code use."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError
from .editor import Prompt
from .pipeline_editor import Output, PipelineEditor
from .pipeline_families import FAMILIES
from .selection import select
from .sharing import Sharing, estimate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def of_pipeline(
    pipe: "DiffusionPipeline", items: Output = "pil", resize: bool = False, max_sequence_length: int | None = None
) -> PipelineEditor:
    """The editor of a pipeline of diffusers, which stays as it is.

        pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
        editor = of_pipeline(pipe, resize=True)
        cat, dog = editor.prompt("a cat on a sofa"), editor.prompt("a dog on a sofa", guidance=2)
        method = RFEdit(num_steps=15, share=Sharing(steps=2))
        made = edit(editor, Image.open("cat.jpg"), cat, dog, method=method, noise=SeedNoise([0]))
        made.items[0].save("dog.png")

    Args:
        items, resize, max_sequence_length: see `PipelineEditor`.
    Raises:
        ConfigError: listing the supported classes, if this is none; or if the pipeline is not a rectified flow.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ConfigError(
            f"of_pipeline: {name} is not supported. Supported are {', '.join(FAMILIES)}. A pipeline on the same parts "
            f"is made one of these by from_pipe, such as FluxPipeline.from_pipe(pipe)."
        )
    editor = FAMILIES[name](pipe, items, resize, max_sequence_length)
    if editor.family == "flux" and not editor.told_guidance:
        warnings.warn(
            "This FLUX transformer takes no guidance (guidance_embeds is false), as those distilled to few steps "
            "(FLUX.1-schnell). Inversion in 4 steps fails on such models; take more, 15 or above.",
            stacklevel=2,
        )
    return editor


def load_pipeline(
    place: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", offload: bool = False
) -> "DiffusionPipeline":
    """A pipeline of a folder, or of an id on the hub, which diffusers downloads.

    Args:
        dtype: of its networks.
        offload: keep each network in memory of the host while another one computes on the device.
    Raises:
        ConfigError: if there is none, what there is cannot be read, or offload has no effect.
    """
    from diffusers import DiffusionPipeline

    from ..export import rf_solver  # noqa: F401  folders saved with our scheduler load only once it is imported

    device = torch.device(device)
    if offload and device.type == "cpu":
        raise ConfigError("pipeline: offload keeps networks off a GPU, and there is none here. Leave it out.")
    try:
        pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"pipeline: {place} cannot be loaded as a pipeline of diffusers ({first}). A folder written by its "
            "save_pretrained, with model_index.json, or an id on the hub is needed."
        ) from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


class Setting(NamedTuple):
    """How a method is used on a family of pipelines.

    Args:
        options: of the method.
        source_guidance: of the prompt of the way up, or of the source's velocity.
        target_guidance: of the prompt of the way down, or of the target's velocity.
        origin: who published it, or that it is our choice.
    """

    options: dict[str, Any]
    source_guidance: float
    target_guidance: float
    origin: str


_RF_EDIT = "Wang et al. 2025 (RF-Edit), scripts of the authors' code"
_FLOWEDIT = "Kulikov et al. 2025 (FlowEdit), settings of the authors' code"
_OURS = "ours: nothing is published"

SETTINGS: dict[tuple[str, str], Setting] = {
    ("flux", "rf_edit"): Setting({"num_steps": 15, "share": {"steps": 2}}, 1.0, 2.0, f"{_RF_EDIT}, to add or replace"),
    ("flux", "rf_edit style"): Setting(
        {"num_steps": 25, "share": {"steps": 4}}, 1.0, 2.0, f"{_RF_EDIT}, 3 to 5 shared"
    ),
    ("flux", "fireflow"): Setting(
        {"num_steps": 8, "share": {"steps": 1, "blocks": "all"}}, 1.0, 2.0, "Deng et al. 2024 (FireFlow), authors' code"
    ),
    ("flux", "flowedit"): Setting({"num_steps": 28, "n_max": 24, "n_min": 0}, 1.5, 5.5, _FLOWEDIT),
    ("flux", "dnaedit"): Setting({"num_steps": 28}, 1.0, 2.5, "Xie et al. 2025 (DNAEdit), authors' code"),
    ("sd3", "rf_edit"): Setting({"num_steps": 25, "share": {"steps": 2}}, 1.0, 3.5, _OURS),
    ("sd3", "flowedit"): Setting({"num_steps": 50, "n_max": 33, "n_min": 0}, 3.5, 13.5, _FLOWEDIT),
    ("hunyuan_video", "rf_edit"): Setting(
        {"num_steps": 25, "share": {"steps": 2}}, 1.0, 6.0, f"{_RF_EDIT}, 1 to 3 shared, guidance 1 to 7"
    ),
    ("wan", "rf_edit"): Setting(
        {"num_steps": 25, "share": {"steps": 2}}, 1.0, 5.0, f"{_OURS}; the pipeline's guidance"
    ),
    ("ltx", "rf_edit"): Setting(
        {"num_steps": 25, "share": {"steps": 2}}, 1.0, 3.0, f"{_OURS}; the pipeline's guidance"
    ),
}


def defaults(editor: PipelineEditor, method: str, style: bool = False) -> Setting:
    """The setting of a method that its authors use on a family, or ours where they use none.

    Args:
        method: by its registered name; those without a setting keep their own options.
        style: the setting for changes of the whole style, where there is one.
    """
    known = [f"{method} style", method] if style else [method]
    for name in known:
        found = SETTINGS.get((editor.family, name))
        if found is not None:
            # not distilled to be told a guidance, those few-step models were trained to do without
            untold = editor.family == "flux" and not editor.told_guidance
            return found._replace(source_guidance=1.0, target_guidance=1.0, origin=_OURS) if untold else found
    return Setting({}, 1.0, 1.0, _OURS)


def shared_bytes(editor: PipelineEditor, sharing: Sharing, x: Tensor, prompt: Prompt, evaluations: int = 2) -> int:
    """Bytes that features of states x will take while an edit runs, before it does.

    Args:
        prompt: of the way up.
        evaluations: of the solver in a step.
    """
    config, text = editor.pipe.transformer.config, prompt.condition.prompted["prompt_embeds"]
    guided = editor.joint and prompt.guidance != 1
    rows = len(x) * (2 if guided else 1)
    size = (editor.pipe.transformer.dtype if editor.video else text.dtype).itemsize
    width = config.num_attention_heads * config.attention_head_dim
    chosen = select(editor.attention(), sharing.blocks, sharing.over, sharing.tensors)
    return sum(
        estimate(sharing, 1, editor.tokens(x, text.shape[1], name), width, size, rows, evaluations)
        for name in dict.fromkeys(layer.name for layer in chosen)
    )
