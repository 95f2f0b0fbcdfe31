"""U-Nets and transformers of diffusers as networks of ours: new ones, or ones that start from a folder of weights."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import pretrained
from ..registry import ConfigError, arguments, register
from ..types import Condition, Shape
from .attention import Attention, Tap
from .embeddings import ConditionEmbedding
from .network import Network, check_images, check_timed

ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # in which a U-Net runs what it holds


class _Adapter(Network):
    """What both have in common: times as their timesteps, labels as theirs, and blocks that can be recomputed.

    Their model is the attribute `model`. Where it gives twice the channels of an item (mean and variance), the first
    half is used, and the weights of the second have a gradient of 0.
    """

    blockwise = True
    kind: ClassVar[str]  # its name in diffusers

    def __init__(self, path: str | None, given: dict[str, Any], time: tuple[float, float], in_shape: Shape,
                 out_shape: Shape, timed: bool) -> None:  # fmt: skip
        super().__init__()
        import diffusers

        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.timed, (self.time_scale, self.time_offset) = timed, time
        name = self.registered_name
        check_images(name, self.in_shape, self.out_shape)
        if path is None:
            try:
                self.model = getattr(diffusers, self.kind)(**given)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
        else:
            self.model = pretrained.load(path, self.kind, name).train()
        inside, outside = self.model.config.in_channels, self.model.config.out_channels
        outside = inside if outside is None else outside
        if inside != in_shape[0] or outside not in (out_shape[0], 2 * out_shape[0]):
            raise ConfigError(
                f"{name}.path: {path} maps {inside} to {outside} channels; {in_shape[0]} to {out_shape[0]} (or twice "
                "as many, of which the first half is used) are needed for these data."
            )
        self.model.enable_gradient_checkpointing(self.recompute)

    def steps(self, t: Tensor | None, x: Tensor) -> Tensor:
        """[B] timesteps of theirs, real numbers; 0 for networks without time."""
        check_timed(self.timed, t)
        return (x.new_zeros(()) if t is None else t * self.time_scale + self.time_offset).expand(len(x))

    def ask(self, x: Tensor, steps: Tensor, labels: Tensor | None) -> Tensor:
        """The answer of their model, in the channels of an item."""
        if not len(x):  # their attention cannot tell the shape of nothing
            return x.new_zeros(0, *self.out_shape)
        return self.model(x, steps, class_labels=labels).sample[:, : self.out_shape[0]]

    def attention(self) -> list[Attention]:
        parts = {"q": "to_q", "k": "to_k", "v": "to_v"}
        found = [(n, m) for n, m in self.model.named_modules() if all(hasattr(m, part) for part in parts.values())]
        found.sort(key=lambda each: ORDER.get(each[0].split(".")[0], 0))
        return [
            Attention(name, "space", {key: Tap(getattr(module, part)) for key, part in parts.items()})
            for name, module in found
        ]


def _unused(cls: type, given: dict[str, Any], where: str) -> None:
    """Raises ConfigError if an option was given beside a folder, whose configuration decides."""
    defaults = {a.name: a.default for a in arguments(cls)}
    changed = [key for key, value in given.items() if value != _tupled(defaults[key])]
    if changed:
        listed = ", ".join(changed)
        raise ConfigError(f"{where}: with path, {pretrained.CONFIG} of that folder decides on {listed}. Drop it.")


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_labels(where: str, found: int | None, num_classes: int | None, rows: int) -> None:
    """Raises ConfigError unless a folder's table of labels has the rows that these data need."""
    if found != rows:
        kept = "has no labels" if not found else f"has rows for {found} labels"
        wanted = "no labels are" if num_classes is None else f"{rows} ({num_classes} classes and one for no label) are"
        raise ConfigError(
            f"{where}.path: the model of that folder {kept}; {wanted} needed for these data. Set model.conditional: "
            "false to train it without labels, or choose another folder."
        )


def _add_null(model: nn.Module) -> None:
    """One more row in a model's table of labels."""
    table = model.class_embedding.weight
    wider = nn.Embedding(len(table) + 1, table.shape[1])
    wider.weight.data = torch.cat((table.data, torch.zeros_like(table.data[:1])))
    model.class_embedding = wider
    model.register_to_config(num_class_embeds=len(table) + 1)


@register(Network, "diffusers_unet")
class DiffusersUNet(_Adapter):
    """diffusers' UNet2DModel, new or from a folder of weights; options as there.

    Their timestep is time_scale · t + time_offset, a real number. Class labels are theirs, with num_classes for "none",
    in a table of num_classes + 1 rows; vectors as conditions pass through a linear layer to the width of their
    embedding. Runs that start from a folder need it again wherever they are loaded.

    Args:
        path: a folder with config.json and weights, which start the network; the other options but those of time then
            come from it.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks of a level.
        down_block_types, up_block_types: one for each level, by their names in diffusers.
        attention_head_dim: channels of an attention head.
        norm_num_groups: groups of the group norms; it must divide all channels.
        resnet_time_scale_shift: how time acts: "default" is a shift.
        downsample_type, upsample_type: how the resolution changes.
        time_scale: timesteps per unit of time.
        time_offset: timestep at t = 0; -1 where the chain of noising steps is counted from 0 (schedule "discrete").
        add_null: give a table of labels that has a row for every class but none for "none" such a row, of zeros.
    Raises:
        ConfigError: if the folder or the options do not fit, or if sides are not divisible by 2^(levels - 1).
    Source: von Platen et al. 2022 (Diffusers), class UNet2DModel.
    """

    kind = "UNet2DModel"

    def __init__(
        self,
        path: str | None = None,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        downsample_type: Literal["conv", "resnet"] = "conv",
        upsample_type: Literal["conv", "resnet"] = "conv",
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
        add_null: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        given = {
            "block_out_channels": block_out_channels, "layers_per_block": layers_per_block,
            "down_block_types": down_block_types, "up_block_types": up_block_types,
            "attention_head_dim": attention_head_dim, "norm_num_groups": norm_num_groups, "dropout": dropout,
            "resnet_time_scale_shift": resnet_time_scale_shift, "downsample_type": downsample_type,
            "upsample_type": upsample_type,
        }  # fmt: skip
        if path is not None:
            _unused(type(self), given, "diffusers_unet")
        rows = None if num_classes is None else num_classes + 1
        vectors = num_classes is None and condition_shape is not None
        given |= {"sample_size": tuple(in_shape[1:]), "in_channels": in_shape[0], "out_channels": out_shape[0]}
        given |= {"num_class_embeds": rows, "class_embed_type": "identity" if vectors else None}
        super().__init__(path, given, (time_scale, time_offset), in_shape, out_shape, timed)
        self._check_sides()
        if add_null and path is not None and self.model.config.num_class_embeds == num_classes:
            _add_null(self.model)
        _check_labels("diffusers_unet", self.model.config.num_class_embeds, num_classes, rows)
        if vectors != (self.model.config.class_embed_type == "identity"):
            raise ConfigError("diffusers_unet.path: vectors need a model whose class_embed_type is identity.")
        width = self.model.time_embedding.linear_2.out_features
        self.num_classes, shape = num_classes, condition_shape if vectors else None
        self.condition = ConditionEmbedding(width, num_classes=None, condition_shape=shape)

    def _check_sides(self) -> None:
        unit, (_, height, width) = 2 ** (len(self.model.config.block_out_channels) - 1), self.in_shape
        if height % unit or width % unit:
            raise ConfigError(
                f"diffusers_unet: {len(self.model.config.block_out_channels)} levels need sides divisible by {unit}, "
                f"found {height}x{width}."
            )

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        steps = self.steps(t, x)
        if self.num_classes is not None:
            labels = torch.full((len(x),), self.num_classes, device=x.device) if condition is None else condition
        else:
            vectors = self.condition(condition, len(x), x)  # also refuses what an unconditional network is given
            labels = vectors if self.condition.condition_shape is not None else None
        return self.ask(x, steps, labels)


@register(Network, "diffusers_dit")
class DiffusersDiT(_Adapter):
    """diffusers' DiTTransformer2DModel, new or from a folder of weights; options as there.

    Their timestep is time_scale · t + time_offset, a real number. Class labels are theirs, with num_classes for "none",
    which is their row for dropped labels; the dropping of labels inside it is switched off, because the model that owns
    the network drops them. Images must be square. Runs that start from a folder need it again wherever they are loaded.

    Args:
        path: a folder with config.json and weights, which start the network; the other options but those of time then
            come from it.
        num_attention_heads, attention_head_dim: heads, and channels of each.
        num_layers: number of blocks.
        patch_size: side of a patch in pixels.
        time_scale: timesteps per unit of time.
        time_offset: timestep at t = 0; -1 where the chain of noising steps is counted from 0 (schedule "discrete").
    Raises:
        ConfigError: if the folder or the options do not fit, for vectors as conditions, or for images that are not
            square.
    Source: Peebles & Xie 2023 (Scalable diffusion models with transformers); von Platen et al. 2022 (Diffusers), class
        DiTTransformer2DModel.
    """

    kind = "DiTTransformer2DModel"

    def __init__(
        self,
        path: str | None = None,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        num_layers: int = 12,
        patch_size: int = 2,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        if num_classes is None and condition_shape is not None:
            raise ConfigError("diffusers_dit: its conditions are class labels. Use dit or unet for vectors.")
        given = {
            "num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim,
            "num_layers": num_layers, "patch_size": patch_size, "dropout": dropout,
        }  # fmt: skip
        if path is not None:
            _unused(type(self), given, "diffusers_dit")
        sizes = {"sample_size": in_shape[-1], "in_channels": in_shape[0], "out_channels": out_shape[0]}
        given |= sizes | {"num_embeds_ada_norm": num_classes or 0, "norm_num_groups": 1}
        super().__init__(path, given, (time_scale, time_offset), in_shape, out_shape, timed)
        patch = self.model.config.patch_size
        if in_shape[1] != in_shape[2] or in_shape[1] % patch:
            raise ConfigError(
                f"diffusers_dit: square images with sides divisible by {patch} are needed, found "
                f"{in_shape[1]}x{in_shape[2]}. Use dit for others."
            )
        if path is not None and num_classes is not None:
            _check_labels("diffusers_dit", self.model.config.num_embeds_ada_norm + 1, num_classes, num_classes + 1)
        self.num_classes = num_classes
        self.none = self.model.config.num_embeds_ada_norm
        for module in self.model.modules():
            if hasattr(module, "class_embedder"):
                module.class_embedder.dropout_prob = 0.0

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        steps = self.steps(t, x)
        if self.num_classes is None and condition is not None:
            raise ValueError("a condition was given to a network that was built without num_classes.")
        labels = torch.full((len(x),), self.none, device=x.device) if condition is None else condition
        return self.ask(x, steps, labels)
