import random
from collections import Counter

import numpy as np
import pytest

from align_cluster.embedded import scene
from align_cluster.embedded.detector import Detection
from align_cluster.embedded.render import render
from align_cluster.rewards.geneval import GenEval, judge, relations
from align_cluster.types import Prompt

MASK = np.zeros((1, 1), dtype=bool)


def seen(label, score=0.9, color=None, at=(0, 0), size=10):
    """A detection centred at `at`."""
    x, y = at
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), MASK, color)


def asked(*include, exclude=()):
    return {"tag": "x", "include": list(include), "exclude": list(exclude)}


def verdict(metadata, *detections):
    result = judge(metadata, detections, threshold=0.5)
    return result.accuracy, result.strict, result.graded


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
BESIDE = asked(DOG, {**CAT, "position": ["left of", 0]})


def test_single_object():
    assert verdict(asked(CAT), seen("cat")) == (True, True, 1)
    assert verdict(asked(CAT), seen("dog")) == (False, False, 0)
    assert verdict(asked(CAT)) == (False, False, 0)


def test_objects_of_other_classes_do_not_matter():
    assert verdict(asked(CAT), seen("cat"), seen("dog"), seen("dog")) == (True, True, 1)


def test_an_object_too_many_fails_strict_only():
    assert verdict(asked(CAT), seen("cat"), seen("cat")) == (True, False, 0)


def test_many_extras_make_the_graded_score_negative():
    assert verdict(asked(CAT), *[seen("cat")] * 4) == (True, False, -2)


def test_two_objects_get_half_for_one():
    assert verdict(asked(CAT, DOG), seen("dog")) == (False, False, 0.5)


def test_only_detections_above_the_threshold_count():
    assert verdict(asked(CAT), seen("cat", score=0.5))[0] is False
    assert verdict(asked(CAT), seen("cat", score=0.5001))[0] is True


def test_at_most_sixteen_objects_of_a_class_count():
    assert verdict(asked({"class": "cat", "count": 16}), *[seen("cat")] * 40) == (True, True, 1)


@pytest.mark.parametrize(
    ("number", "expected"), [(2, (False, False, 2 / 3)), (3, (True, True, 1)), (4, (False, False, 2 / 3))]
)
def test_counting_excludes_one_more(number, expected):
    metadata = asked({"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
    assert verdict(metadata, *[seen("cat")] * number) == pytest.approx(expected)


def test_an_excluded_class_fails_accuracy_and_strict_but_not_the_graded_score():
    assert verdict(asked(CAT, exclude=[DOG]), seen("cat"), seen("dog")) == (False, False, 1)


def test_a_wrong_color_earns_the_count_only():
    assert verdict(asked({**CAT, "color": "red"}), seen("cat", color="red")) == (True, True, 1)
    assert verdict(asked({**CAT, "color": "red"}), seen("cat", color="blue")) == (False, False, 0.5)
    assert verdict(asked({**CAT, "color": "red"}), seen("cat", color=None)) == (False, False, 0.5)


def test_color_credit_is_partial_and_nothing_where_the_count_failed():
    two = asked({"class": "cat", "count": 2, "color": "red"})
    assert verdict(two, seen("cat", color="red"), seen("cat", color="blue")) == (False, False, 0.75)
    assert verdict(two, seen("cat", color="red")) == (False, False, 0.25)


def test_official_color_looks_at_the_most_confident_objects():
    red = asked({**CAT, "color": "red"})
    surer, other = seen("cat", 0.9, "blue"), seen("cat", 0.8, "red")
    assert verdict(red, other, surer)[0] is False
    assert verdict(red, seen("cat", 0.95, "red"), surer)[0] is True


def test_of_equally_confident_objects_the_earlier_goes_first():
    red = asked({**CAT, "color": "red"})
    assert verdict(red, seen("cat", color="red"), seen("cat", color="blue"))[0] is True
    assert verdict(red, seen("cat", color="blue"), seen("cat", color="red"))[0] is False


def test_position_holds_and_fails():
    assert verdict(BESIDE, seen("dog", at=(50, 0)), seen("cat", at=(0, 0))) == (True, True, 1)
    assert verdict(BESIDE, seen("dog", at=(0, 0)), seen("cat", at=(50, 0))) == (False, False, 2 / 3)


def test_position_fails_where_its_target_is_missing_or_has_the_wrong_color():
    assert verdict(BESIDE, seen("cat")) == (False, False, 1 / 3)
    metadata = asked({**DOG, "color": "red"}, {**CAT, "position": ["left of", 0]})
    assert verdict(metadata, seen("dog", color="blue", at=(50, 0)), seen("cat")) == (False, False, 0.5)


def test_position_must_hold_for_every_pair():
    metadata = asked({"class": "dog", "count": 2}, {**CAT, "position": ["left of", 0]})
    assert verdict(metadata, seen("dog", at=(50, 0)), seen("dog", at=(60, 9)), seen("cat"))[0] is True
    assert verdict(metadata, seen("dog", at=(50, 0)), seen("dog", at=(-50, 0)), seen("cat"))[0] is False


def test_position_may_name_a_later_clause():
    metadata = asked({**CAT, "position": ["left of", 1]}, DOG)
    assert verdict(metadata, seen("dog", at=(50, 0)), seen("cat")) == (True, True, 1)


def test_a_failed_position_does_not_serve_as_a_target():
    metadata = asked(DOG, {**CAT, "position": ["left of", 0]}, {"class": "cow", "count": 1, "position": ["above", 1]})
    cow = seen("cow", at=(50, -50))
    assert verdict(metadata, seen("dog"), seen("cat", at=(50, 0)), cow) == (False, False, 3 / 5)


def box(x, y, width=10, height=10):
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def test_y_points_down():
    assert relations(box(0, 0), box(0, 40)) == {"above"}
    assert relations(box(0, 40), box(0, 0)) == {"below"}
    assert relations(box(0, 0), box(40, 0)) == {"left of"}
    assert relations(box(40, 0), box(0, 0)) == {"right of"}


def test_two_relations_hold_on_the_diagonal_and_none_in_place():
    assert relations(box(0, 0), box(40, 40)) == {"left of", "above"}
    assert relations(box(0, 0), box(0, 0)) == set()


def test_offsets_shrink_by_a_tenth_of_both_sizes():
    assert relations(box(2, 0), box(0, 0)) == set()  # 2 - .1 * (10 + 10) = 0
    assert relations(box(3.9, 0), box(0, 0)) == set()  # (3.9 - 2) / 3.9 < .5: the norm is that of the unshrunk offset
    assert relations(box(4.1, 0), box(0, 0)) == {"right of"}
    assert relations(box(4.1, 0, width=12), box(0, 0)) == set()


def by_the_book(metadata, detections, threshold):
    """Accuracy by GenEval's text, independently: sort, cut, count."""
    ranked = [d for d in sorted(detections, key=lambda d: d.score, reverse=True) if d.score > threshold]
    chosen = {}
    for index, clause in enumerate(metadata["include"]):
        top = [d for d in ranked if d.label == clause["class"]][: clause["count"]]
        if len(top) < clause["count"]:
            return False
        if "color" in clause and Counter(d.color for d in top)[clause["color"]] < clause["count"]:
            return False
        chosen[index] = top
        if "position" in clause:
            word, target = clause["position"]
            axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[word]
            for one in top:
                for other in chosen[target]:
                    gaps = [(one.box[k] + one.box[k + 2] - other.box[k] - other.box[k + 2]) / 2 for k in (0, 1)]
                    width = sum(d.box[axis + 2] - d.box[axis] for d in (one, other))
                    reach = sign * gaps[axis] - 0.1 * width
                    if reach <= 0 or reach / (gaps[0] ** 2 + gaps[1] ** 2) ** 0.5 <= 0.5:
                        return False
    return not any(sum(d.label == c["class"] for d in ranked) >= c["count"] for c in metadata["exclude"])


def test_accuracy_agrees_with_an_independent_reading_of_the_rules():
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(3000):
        include = []
        for index, name in enumerate(rng.sample(("cat", "dog", "cow"), rng.choice((1, 2)))):
            include.append({"class": name, "count": rng.choice((1, 1, 2))})
            if rng.random() < 0.4:
                include[-1]["color"] = rng.choice(("red", "blue"))
            if index and rng.random() < 0.6:
                include[-1]["position"] = [rng.choice(scene.RELATIONS), 0]
        exclude = [{"class": include[0]["class"], "count": include[0]["count"] + 1}] if rng.random() < 0.5 else []
        detections = [
            seen(
                rng.choice(("cat", "dog", "cow")),
                rng.uniform(0.4, 1),
                rng.choice(("red", "red", "blue")),
                (rng.uniform(0, 48), rng.uniform(0, 48)),
                rng.uniform(6, 20),
            )
            for _ in range(rng.randrange(1, 6))
        ]
        metadata = asked(*include, exclude=exclude)
        result = judge(metadata, detections, 0.5)
        assert result.accuracy == by_the_book(metadata, detections, 0.5)
        assert result.accuracy or not result.strict
        assert result.graded <= 1 and (result.graded == 1 or not result.strict)
        outcomes[result.accuracy] += 1
    assert min(outcomes.values()) > 300


def scored(records, images, **settings):
    reward = GenEval(GenEval.Config(**settings))
    reward.load("cpu", 1)
    return reward.score(images, [Prompt(i, record["prompt"], record) for i, record in enumerate(records)])


RECORDS = [scene.prompts(task, "held_out")[i] for task in scene.TASKS for i in range(3)]
IMAGES = render(RECORDS, 2).permute(0, 2, 3, 1).numpy()
MIXED_UP = np.concatenate([IMAGES[:9], np.roll(IMAGES[9:], 3, axis=0)])


def test_rendered_truth_scores_one_and_prompts_without_objects_are_invalid():
    result = scored(RECORDS, IMAGES)
    objects = np.array([record["tag"] != "ocr" for record in RECORDS])
    assert (result.valid == objects).all()
    assert (result.values[objects] == 1).all() and np.isnan(result.values[~objects]).all()
    assert set(result.details) == {"accuracy", "strict", "graded"}


@pytest.mark.parametrize("score", ["graded", "strict", "accuracy", "mixed"])
def test_the_score_setting_chooses_the_column(score):
    result = scored(RECORDS, MIXED_UP, score=score)
    expected = {**result.details, "mixed": (result.details["graded"] + result.details["accuracy"]) / 2}[score]
    np.testing.assert_array_equal(result.values, expected)
    assert len(set(result.values[result.valid].tolist())) > 1


def test_a_batch_scores_as_its_images_do_one_by_one():
    batch = scored(RECORDS, MIXED_UP).values
    singles = [scored([record], MIXED_UP[i : i + 1]).values[0] for i, record in enumerate(RECORDS)]
    np.testing.assert_array_equal(batch, singles)
    twice = scored([RECORDS[0]] * 2, IMAGES[[0, 0]]).values
    assert twice[0] == twice[1]
