"""Pipelines of diffusers as editors: loading them, and the settings that papers and their authors' code use."""

import warnings
from typing import TYPE_CHECKING

import torch

from .pipeline_editor import Output, PipelineEditor
from .pipeline_families import FAMILIES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def of_pipeline(
    pipe: "DiffusionPipeline", items: Output = "pil", resize: bool = False, max_sequence_length: int | None = None
) -> PipelineEditor:
    """The editor of a pipeline of diffusers, which stays as it is.

    Raises:
        ValueError: listing the supported classes, if this is none; or if the pipeline is not a rectified flow.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(
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
        offload: keep each network in memory of the host while another one computes.
    Raises:
        ValueError: if there is none, or what there is cannot be read.
    """
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"pipeline: {place} cannot be loaded as a pipeline of diffusers ({first}). A folder written by its "
            "save_pretrained, with model_index.json, or an id on the hub is needed."
        ) from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)
