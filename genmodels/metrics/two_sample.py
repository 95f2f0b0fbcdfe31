"""Classifier two-sample tests: can a classifier tell drawn samples from data?"""

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..types import Estimate
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject

if TYPE_CHECKING:
    import numpy as np

Classifier = Literal["mlp", "logistic"]
LEAST = 20  # items per side: fewer leave nothing to stop the training of the MLP by
SIGNIFICANT = 3.0  # standard errors


class Answers(NamedTuple):
    """How a classifier did on items that it was not trained on.

    Args:
        fake, real: how many of each side there were, and how many of them were told right.
        auc: area under its ROC curve, mean over folds.
    """

    fake: tuple[int, int]
    real: tuple[int, int]
    auc: float

    @property
    def accuracy(self) -> float:
        """The mean of the two shares told right, so that the sizes of the sides do not matter."""
        return sum(right / n for n, right in (self.fake, self.real)) / 2


def accuracy_stderr(answers: Answers, folds: int) -> float:
    """Standard error of the accuracy of a cross-validation: that of independent items times √(1 + K/(K - 1)).

    K folds share their training items, so that their errors go together; for data that cannot be told apart the
    variance is nearly twice the binomial one. Nadeau & Bengio's correction of the variance of a mean over K folds, from
    1/K to 1/K + 1/(K - 1), covers that, and is conservative where the sides differ clearly. Shares are taken as
    (hits + 1)/(n + 2), above 0 and below 1.

    Source: Nadeau & Bengio 2003 (Inference for the generalization error), section 3.
    """
    shares = [(n, (right + 1) / (n + 2)) for n, right in (answers.fake, answers.real)]
    independent = sum(p * (1 - p) / n for n, p in shares) / 4
    return math.sqrt(_inflation(folds) * independent)


def auc_stderr(n: int, m: int, folds: int) -> float:
    """Standard error of the area under the ROC curve where the sides cannot be told apart (Mann-Whitney), corrected for
    the dependence of the folds like `accuracy_stderr`."""
    return math.sqrt(_inflation(folds) * (n + m + 1) / (12 * n * m))


def _inflation(folds: int) -> float:
    return 1 + folds / (folds - 1)


def two_sample_test(fake: Tensor, real: Tensor, classifier: Classifier, folds: int = 5) -> Answers:
    """Train a classifier on all folds but one, and ask it about that one; fold by fold.

    Each side is dealt to the folds at random, apart from the other side: a copy must not share the fold of its
    original, or neither would be in the training set of the other. The larger side is cut for training, where both
    have the same number; every item is asked about. Features are standardised by the training items, constant ones
    only centred. The order of the rows does not matter.

    Args:
        fake: [N, D] features of drawn items.
        real: [M, D] features of data.
        classifier: "mlp" with layers of 64 and 64, stopped early on a tenth of its training items, or "logistic".
    Source: Lopez-Paz & Oquab 2017 (Revisiting classifier two-sample tests), section 3.
    """
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    sides = [_dealt(z, name).numpy() for z, name in ((fake, "fake"), (real, "real"))]
    right, areas = [0, 0], []
    with threadpool_limits(1, "blas"):  # sums depend on the number of threads, and small products gain nothing
        for fold in range(folds):
            train = [_training_rows(len(side), fold, folds) for side in sides]
            least = min(map(len, train))
            fitted = _fit(classifier, *(side[rows[:least]] for side, rows in zip(sides, train, strict=True)))
            scores = [fitted.predict_proba(side[fold::folds])[:, 1] for side in sides]
            right = [right[0] + int((scores[0] < 0.5).sum()), right[1] + int((scores[1] >= 0.5).sum())]
            labels = [0] * len(scores[0]) + [1] * len(scores[1])
            areas.append(roc_auc_score(labels, [*scores[0], *scores[1]]))
    return Answers((len(fake), right[0]), (len(real), right[1]), sum(areas) / folds)


def _dealt(z: Tensor, side: str) -> Tensor:
    """The rows in float64 in a random order that does not depend on the order they came in."""
    z = z.double().cpu()
    line = torch.randn(z.shape[1], generator=generator("order"), dtype=torch.float64)
    canonical = z[(z @ line).argsort()]  # rows that meet there are equal
    return canonical[torch.randperm(len(z), generator=generator("folds", side))]


def _training_rows(n: int, fold: int, folds: int) -> Tensor:
    rows = torch.arange(n)
    return rows[rows % folds != fold]


def _fit(classifier: Classifier, fake: "np.ndarray", real: "np.ndarray") -> Any:
    """A classifier trained on the rows of both sides; class 1 is real."""
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = {
        "mlp": lambda: MLPClassifier((64, 64), early_stopping=True, random_state=0),
        "logistic": lambda: LogisticRegression(max_iter=1000),
    }
    labels = np.repeat([0, 1], [len(fake), len(real)])
    with warnings.catch_warnings():  # a classifier that stops short of its optimum is a classifier still
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), made[classifier]()).fit(np.concatenate([fake, real]), labels)


@register(Metric, "c2st")
class ClassifierTwoSampleTest(FeatureMetric):
    """Accuracy of classifiers that tell drawn samples from a split of the data: 0.5 is indistinguishable, 1 is apart.

    The mean of the shares told right on either side, by cross-validation. The headline is a small MLP; logistic
    regression sees shifts of the mean and little else. Copies of the reference push both below 0.5, the more so the
    more features there are for the number of items: the copy of an item is trained on with the other label. An area
    under the ROC curve more than 3 standard errors below 0.5, by any of the classifiers, flags the model; it tells
    copies better than the accuracy does.

    Args:
        features: the extractor.
        reference: the split that samples are compared with.
        classifiers: which ones; each gives its own estimate.
        folds: of the cross-validation.
        max_items: most items of either side, chosen at random.
    Source: Lopez-Paz & Oquab 2017 (Revisiting classifier two-sample tests), section 3; Nadeau & Bengio 2003 (Inference
        for the generalization error), section 3, for the standard error.
    """

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        classifiers: tuple[Literal["mlp", "logistic"], ...] = ("mlp", "logistic"),
        folds: int = 5,
        max_items: int = 2000,
    ) -> None:
        if folds < 2 or max_items < LEAST or not classifiers:
            raise ValueError(
                f"c2st: folds >= 2, max_items >= {LEAST} and at least one classifier are needed, found folds={folds}, "
                f"max_items={max_items} and classifiers={list(classifiers)}."
            )
        self.features, self.reference, self.classifiers = features, reference, tuple(classifiers)
        self.folds, self.max_items, self.splits = folds, max_items, (reference,)

    def start(self, subject: Subject) -> None:
        self.target = self._some(subject.features(self.features, self.reference), f"the split '{self.reference}'")
        self.restart()

    def compute(self) -> dict[str, Estimate]:
        z = self._some(self.drawn(), "the sample")
        found = {c: two_sample_test(z, self.target, c, self.folds) for c in self.classifiers}
        limit = 0.5 - SIGNIFICANT * auc_stderr(len(z), len(self.target), self.folds)
        flags = ("overlap_suspected",) if min(answers.auc for answers in found.values()) < limit else ()
        return {self._name(c): self._estimate(answers, flags) for c, answers in found.items()}

    def _estimate(self, answers: Answers, flags: tuple[str, ...]) -> Estimate:
        stderr, n = accuracy_stderr(answers, self.folds), answers.fake[0]
        references = {"indistinguishable": 0.5}
        detail = f"AUC {answers.auc:.3f}, {self.folds} folds, {n} against {answers.real[0]}"
        return Estimate(answers.accuracy, stderr, n, "1", "lower", "plug-in", references, flags=flags, detail=detail)

    def _name(self, classifier: Classifier) -> str:
        method = "" if classifier == "mlp" else f"{classifier}-"
        return f"C2ST-{method}{self.features.label}" + ("" if self.reference == "train" else f"-{self.reference}")

    def _some(self, z: Tensor, what: str) -> Tensor:
        """At most `max_items` rows, the same ones whatever their order.

        Raises:
            ValueError: if there are too few to train on.
        """
        if len(z) < LEAST:
            raise ValueError(f"c2st: {what} has {len(z)} items; at least {LEAST} are needed. Draw more.")
        return _dealt(z, what)[: self.max_items]
