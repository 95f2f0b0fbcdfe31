"""Diffusion models as editors: an exact network makes their flow that of a known law, and every edit has a closed form.

Label k of the exact network shifts the clean item by k (3 stands for no label and shifts by nothing), so that the flow
takes the noise ε to T(ε) + k: an edit by exact inversion from label a to label b adds b - a.
"""

import math

import pytest
import torch
from torch import Tensor

from genmodels import schema
from genmodels.diffusion.denoiser import denoiser_of
from genmodels.diffusion.grids import Shifted
from genmodels.diffusion.model import DiffusionModel
from genmodels.diffusion.schedules import Linear, Schedule
from genmodels.editing.by_inversion import RFEdit, Vanilla
from genmodels.editing.editor import Prompt, Walk
from genmodels.editing.exact import MixtureEditor
from genmodels.editing.flow_edit import FlowEdit
from genmodels.editing.method import EditMethod, Outcome
from genmodels.editing.parts import Part, edit_parts
from genmodels.editing.rf_inversion import RFInversion
from genmodels.model import Model
from genmodels.networks.attention import Attention
from genmodels.registry import ConfigError, build, kind, register, resolve
from genmodels.rng import SeedNoise
from genmodels.solvers.runge_kutta import Euler
from genmodels.transforms import Affine, Compose, Dequantize, Identity, Transform
from genmodels.types import Edited, NotApplicable, SupportsEdit
from tests.contracts.test_denoiser import TWO, Oracle, randn
from tests.unit.fakes import restored

BARE = RFEdit(num_steps=20, share=None)


def exact(
    prediction: str = "velocity", transform: Transform | None = None, shift: float = 1.0, **node
) -> DiffusionModel:
    """A model of points of the line in three classes whose network is exact."""
    node = {"name": "diffusion", "network": {"name": "residual_mlp", "hidden": 4, "blocks": 1},
            "prediction": prediction, **node}  # fmt: skip
    facts = {"num_classes": 3, "condition_shape": None, "bin_width": None, "transform": transform or Identity()}
    model = build(Model, resolve(Model, node, "test"), shape=(1,), **facts).double()
    model.denoiser = denoiser_of(Oracle(TWO, Linear(), prediction, 1.0, shift), Linear(), prediction, 1.0)
    model.denoiser.network.attention = tuple
    model.denoiser.network.parameters = lambda: iter([torch.zeros((), dtype=torch.float64)])
    return model


def labels(k: int, n: int) -> Tensor:
    return torch.full((n,), k)


X = randn(6, 1)


def test_an_edit_moves_items_as_the_law_of_its_prompt():
    """The way there and back is of order 2 each, and the error with it: (1/4)² of it at four times the steps."""
    model = exact()
    errors = []
    for n in (10, 20, 40):
        made = model.edit(X, source=labels(0, 6), target=labels(2, 6), method=RFEdit(n, share=None))
        errors.append((made.x - X - 2).abs().max().item())
        assert made.nfe == 4 * n and made.stored == 0 and made.noise is not None
    assert errors[2] < 2e-3 and math.log2(errors[0] / errors[1]) > 1.7 and math.log2(errors[1] / errors[2]) > 1.7
    made = model.edit(X, source=None, target=labels(2, 6), method=RFEdit(40, share=None))
    torch.testing.assert_close(made.x, X + 2, rtol=0, atol=2e-3)


def test_the_noise_of_items_is_that_of_their_law():
    """One component, N(m, s²): the flow is linear in law, and takes x to the noise (x - m)/s."""
    model, x = exact(shift=0.0), X
    model.denoiser.network.law = type(TWO)(((1.5,),), ((0.25,),), (1.0,), shape=(1,))
    found = model.invert(x, source=labels(1, 6), method=RFEdit(60, share=None))
    torch.testing.assert_close(found.noise, (x - 1.5) / 0.5, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.reconstruction, x, rtol=0, atol=1e-4)
    assert found.nfe == 120


@pytest.mark.parametrize("method", [BARE, FlowEdit(num_steps=12, n_max=9)])
def test_it_is_the_editor_of_the_exact_law(method):
    """Guidance 2 towards label 1, asked of the law itself: an implementation that knows no network."""
    model, editor = exact(), MixtureEditor(free=TWO, shift=3.0)
    interval = (0.2, 5.0)
    law = type(TWO)(((0.0,), (2.0,)), ((0.09,), (0.25,)), (0.3, 0.7), shape=(1,))
    made = model.edit(
        X, source=None, target=labels(1, 6), method=method, grid=Shifted(3.0), guidance=2.0, interval=interval
    )
    times = editor.times(method.num_steps, X)
    noise = SeedNoise(6, purpose="edit")
    expected = method.edit(editor, X, Prompt(TWO), Prompt(law, 2.0, interval), times, noise)
    torch.testing.assert_close(made.x, expected.x, rtol=0, atol=1e-9)
    assert made.nfe == expected.nfe and (made.x - X).abs().max() > 0.5


def test_what_is_told_by_hand():
    """Euler's steps up and down, written out with the model's own velocities, guided at both ends of every step."""
    model, n, w = exact(), 8, 1.7

    def velocity(t: float, x: Tensor) -> Tensor:
        at = torch.tensor(t, dtype=torch.float64)
        free, told = (model.velocity(at, x, condition=labels(k, 6)) for k in (3, 2))
        return free + w * (told - free)

    z = X
    for i in range(n):
        z = z + velocity(i / n, z) / n
    y = z
    for i in range(n, 0, -1):
        y = y - velocity(i / n, y) / n
    options = {"method": Vanilla(n), "guidance": w, "source_guidance": w}
    made = model.edit(X, source=labels(2, 6), target=labels(2, 6), **options)
    torch.testing.assert_close(made.noise, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(made.x, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(made.reconstruction, y, rtol=0, atol=1e-12)
    assert model.denoiser.network.rows[-1] == 12, "one call for both answers"


@pytest.mark.parametrize("prediction", ["x", "eps", "edm"])
def test_whatever_the_network_predicts(prediction):
    """All predictions of one law are one flow, between the times at which they can be asked."""
    made, other = (
        exact(p).edit(X, source=labels(0, 6), target=labels(1, 6), method=BARE).x for p in (prediction, "velocity")
    )
    torch.testing.assert_close(made, other, rtol=0, atol=2e-2)


def test_items_depend_on_their_own_seed_alone():
    model, order = exact(), torch.tensor([4, 0, 5])
    options = {"method": FlowEdit(num_steps=6, n_max=6), "guidance": 1.5}
    whole = model.edit(X, source=labels(0, 6), target=labels(1, 6), seeds=range(10, 16), batch_size=4, **options)
    some = model.edit(X[order], source=labels(0, 3), target=labels(1, 3), seeds=10 + order, **options)
    torch.testing.assert_close(whole.x[order], some.x, rtol=0, atol=1e-12)
    assert whole.noise is None and whole.nfe == some.nfe == 12
    given = {"method": RFInversion(num_steps=6, stop=2), "source": labels(1, 6)}
    edit, same = model.edit(X, target=labels(0, 6), **given), model.edit(X, target=labels(1, 6), **given)
    assert torch.equal(same.x, same.reconstruction) and torch.equal(edit.reconstruction, same.reconstruction)
    method, bare = Vanilla(num_steps=6), RFEdit(num_steps=6, share=None)
    method.plain = lambda: bare  # a reconstruction is made by what shares nothing
    made, plain = (model.edit(X, source=labels(1, 6), target=labels(0, 6), method=each) for each in (method, bare))
    assert torch.equal(made.reconstruction, plain.reconstruction) and not torch.equal(made.x, plain.x)
    other = model.edit(X, source=labels(0, 6), target=labels(1, 6), seeds=6, **options)
    assert (other.x - whole.x).abs().min() > 1e-6
    none = model.edit(X[:0], source=labels(0, 0), target=labels(1, 0), method=BARE, reconstruct=False)
    assert none.x.shape == (0, 1) and none.reconstruction is None


def test_parts_are_joined_and_their_bytes_are_added():
    class Storing(EditMethod):
        num_steps = 1

        def edit(self, editor, x, source, target, times, noise):
            return Outcome(x + 1, None, 3, 8 * len(x))

    prompt = Prompt(TWO)
    parts = [Part(X[rows], prompt, prompt, SeedNoise(len(X[rows]))) for rows in torch.arange(len(X)).split(4)]
    made = edit_parts(MixtureEditor(), parts, method=Storing(), reconstruct=False)
    assert torch.equal(made.items, X + 1) and made.stored == 8 * len(X) and made.nfe == 3 and len(parts) > 1


def test_levels_lie_amid_their_cells_and_edits_between_them():
    """Four levels on [-1, 1]: level k is (k + 1/2)/2 - 1 in model space, and nothing on the way back is rounded."""
    model = exact(transform=Compose((Dequantize(4), Affine(2.0, 2.0))))
    editor, x = model.editor(), torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(editor.encode(x), (x + 0.5) / 2 - 1)
    torch.testing.assert_close(editor.decode(editor.encode(x)), x)
    beyond = torch.tensor([[-1.3], [0.13], [1.9]], dtype=torch.float64)
    torch.testing.assert_close(editor.encode(editor.decode(beyond)), beyond)
    made = model.edit(x, source=labels(0, 4), target=labels(1, 4), method=RFEdit(40, share=None))
    torch.testing.assert_close(made.x, x + 2, rtol=0, atol=1e-2)  # a shift by 1 in model space is 2 levels
    torch.testing.assert_close(made.reconstruction, x, rtol=0, atol=1e-3)
    assert (made.x != made.x.round()).all()


def test_states_are_kept_in_float32_where_the_network_is_narrower():
    model = exact()
    model.denoiser.network.parameters = lambda: iter([torch.zeros((), dtype=torch.bfloat16)])
    editor = model.editor()
    x = editor.encode(X.float())
    assert x.dtype == torch.float32
    v = Walk(editor, Prompt(labels(1, 6)), editor.times(3, x))(torch.tensor(0.5, dtype=torch.float64), x)
    assert v.dtype == torch.float32


def test_layers_of_attention_are_those_of_the_network():
    model, layers = exact(), (Attention("blocks.0", "space", {}),)
    model.denoiser.network.attention = lambda: layers
    assert model.editor().attention() == layers


def test_what_fits_the_capability():
    assert isinstance(exact(), SupportsEdit)
    made = exact().edit(X, source=None, target=labels(1, 6), method=Vanilla(2))
    assert isinstance(made, Edited) and isinstance(BARE, EditMethod)


def test_what_is_refused():
    model = exact()
    facts = {"source": labels(0, 6), "target": labels(1, 6), "method": BARE}
    for schedule in ("vp", "cosine", "trigonometric"):
        other = exact()
        other.denoiser.schedule = build(Schedule, schedule)
        with pytest.raises(NotApplicable, match=f"not a rectified flow: model.schedule is '{schedule}'.*=linear"):
            other.edit(X, **facts)
    with pytest.raises(ConfigError, match="knows no conditions"):
        exact(conditional=False).edit(X, source=None, target=None, method=BARE)
    for change, message in (
        ({"target": labels(4, 6)}, "holds the class 4, but there are only 3 classes"),
        ({"target": labels(1, 5)}, "a tensor of 6 conditions is needed"),
        ({"seeds": 3}, "6 seeds are needed, one per item, found 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"guidance": math.nan}, "guidance: a finite number is needed"),
        ({"interval": (0.1, 1.0)}, "interval was given, and guidance = 1 is off"),
        ({"interval": (1.0, 0.5), "guidance": 2.0}, "0 <= low < high"),
        ({"target": None, "guidance": 2.0}, "needs conditions to guide towards"),
        ({"method": RFEdit(4)}, "attention"),
        ({"method": RFEdit(0, share=None)}, "num_steps: at least 1 is needed, found 0"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            model.edit(X, **(facts | change))
    with pytest.raises(ValueError, match=r"built for \[B, 1\]"):
        model.edit(randn(6, 2), **facts)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a conditional model trained with condition_dropout > 0"):
        exact(condition_dropout=0.0).edit(X, **facts, guidance=2.0)
    with pytest.raises(ConfigError, match="'flowedit' does not invert"):
        model.invert(X, source=labels(0, 6), method=FlowEdit())


def test_a_default_with_arguments_within_its_parts_is_refused():
    """A method's solver is no configuration of its own: only whole defaults can be named."""
    with restored():

        @kind
        class Part:
            """Parts."""

        @register(Part, "whole")
        class Whole(Part):
            """Made of a solver that is no argument."""

            def __init__(self, probe: float = 0.5) -> None:
                self.solver = type("Solver", (), {})()
                self.solver.probe = [probe, Euler()]

        def plain(*, part: Part = Whole()) -> None: ...
        def other(*, part: Part = Whole(0.25)) -> None: ...

        for f in (plain, other):
            f.__annotations__["part"] = Part
        assert schema.arguments(plain)[0].default == {"name": "whole"}
        with pytest.raises(TypeError, match="would lose them in a configuration"):
            schema.arguments(other)
