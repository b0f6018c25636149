"""What follows from a confusion table, against counting pair by pair in exact fractions."""

from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from minilora.runs.confusion import Confusion

LABELS = ("ham", "spam", "eggs", "toast")
classes = st.integers(0, len(LABELS) - 1)
pairs = st.lists(st.tuples(classes, classes), min_size=1, max_size=30)


def exact(value, expected):
    """Is a float the exact fraction, up to the rounding of a few operations?"""
    return abs(Fraction(value) - expected) <= Fraction(1, 10**14)


def share(found, of):
    """The share of the pairs `of` which that are `found`, as a fraction; 0 of none is 0."""
    return Fraction(sum(map(found, of)), len(of)) if of else Fraction(0)


def by_hand(pairs, i):
    """Precision and recall of class i, and F1 as their harmonic mean."""
    precision = share(lambda pair: pair[0] == i, [pair for pair in pairs if pair[1] == i])
    recall = share(lambda pair: pair[1] == i, [pair for pair in pairs if pair[0] == i])
    both = precision + recall
    return precision, recall, (2 * precision * recall / both if both else Fraction(0))


@given(pairs)
def test_a_count_is_how_many_of_a_class_were_taken_for_another(pairs):
    table = Confusion.of(iter(pairs), LABELS)
    assert [[table.counts[i][j] for j in range(4)] for i in range(4)] == [
        [pairs.count((i, j)) for j in range(4)] for i in range(4)
    ]


@given(pairs)
def test_accuracy_is_the_share_of_pairs_that_are_equal(pairs):
    assert exact(Confusion.of(pairs, LABELS).accuracy, share(lambda pair: pair[0] == pair[1], pairs))


@given(pairs)
@example([(0, 1)])  # of class 1 there was none, for class 0 nothing was taken, of the others neither
def test_precision_recall_and_f1_of_each_class_are_those_counted_by_hand(pairs):
    for i, score in enumerate(Confusion.of(pairs, LABELS).classes):
        precision, recall, f1 = by_hand(pairs, i)
        assert exact(score.precision, precision)
        assert exact(score.recall, recall)
        assert exact(score.f1, f1)
        assert score.count == sum(true == i for true, _ in pairs)


@given(pairs)
@example([(0, 0), (1, 0)])
def test_macro_f1_is_the_mean_over_classes_that_occur_and_weighted_f1_that_over_rows(pairs):
    table = Confusion.of(pairs, LABELS)
    seen = {i for pair in pairs for i in pair}
    assert exact(table.macro_f1, sum(by_hand(pairs, i)[2] for i in seen) / len(seen))
    assert exact(table.weighted_f1, sum(by_hand(pairs, true)[2] for true, _ in pairs) / len(pairs))


@given(pairs, st.permutations(range(4)))
def test_the_order_of_the_labels_changes_no_score(pairs, order):
    one = Confusion.of(pairs, LABELS)
    other = Confusion.of([(order[i], order[j]) for i, j in pairs], [LABELS[order.index(i)] for i in range(4)])
    assert one.accuracy == other.accuracy
    assert exact(one.macro_f1, Fraction(other.macro_f1))
    assert one.record()["classes"] == other.record()["classes"]


def test_a_record_has_everything_by_name():
    assert Confusion.of([(0, 0), (0, 1), (1, 1)], ("no", "yes")).record() == {
        "accuracy": 2 / 3,
        "macro_f1": 2 / 3,
        "weighted_f1": 2 / 3,
        "classes": {
            "no": {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "count": 2},
            "yes": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "count": 1},
        },
        "confusion": [[1, 1], [0, 1]],
    }
