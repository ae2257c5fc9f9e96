import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from align_cluster.embedded import scene
from align_cluster.embedded.detector import Detection, detect
from align_cluster.embedded.render import render
from align_cluster.rewards.colors import ColorNamer
from align_cluster.rewards.detectors import Boxes, Embedded, Masks
from align_cluster.rewards.geneval import GenEval, colored, judge, relations, strongest
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


def test_of_equally_confident_objects_beyond_sixteen_the_later_do_not_count():
    clause = {"class": "cat", "count": 16, "color": "red"}
    cats = [seen("cat", color="red")] * 16
    assert verdict(asked(clause), *cats, seen("cat", color="blue"))[0] is True
    assert verdict(asked(clause), seen("cat", color="blue"), *cats) == (False, False, (1 + 15 / 16) / 2)


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


def test_a_wrong_position_earns_half_only_where_flow_grpos_slip_is_asked_for():
    def graded(*detections):
        return judge(BESIDE, detections, 0.5, half_credit=True).graded

    dog, cat = seen("dog"), seen("cat", at=(50, 0))
    assert judge(BESIDE, (dog, cat), 0.5).graded == pytest.approx((1 + 1 + 0) / 3)
    assert graded(dog, cat) == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert graded(seen("dog", at=(50, 0)), seen("cat")) == 1  # as it should stand
    assert graded(cat) == pytest.approx((0 + 1 + 0) / 3)  # nothing to stand beside: no slip there
    assert graded(dog) == pytest.approx((1 + 0 + 0) / 3)
    for pair in ((dog, cat), (cat,)):
        plain, slip = judge(BESIDE, pair, 0.5), judge(BESIDE, pair, 0.5, half_credit=True)
        assert (plain.accuracy, plain.strict) == (slip.accuracy, slip.strict)


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
    assert relations(box(4, 0), box(0, 0)) == set()  # exactly half is not enough
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


def by_the_server(metadata, detections, threshold, slip):
    """The graded score by Flow-GRPO's reward server, independently. A slip of its own: see `half_credit`."""
    parts, groups = [], []
    for clause in metadata["include"]:
        count, right = clause["count"], True
        objects = sorted((d for d in detections if d.label == clause["class"] and d.score > threshold), key=rank)
        parts.append(1 - abs(count - len(objects)) / count)
        if len(objects) != count:
            right = False
            parts += [0] * ("color" in clause or "position" in clause)
        elif "color" in clause:
            matches = sum(d.color == clause["color"] for d in objects)
            parts.append(matches / count)
            right = matches == count
        elif "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None:
                right = False
                parts.append(0)
            elif all(relation in relations(a.box, b.box) for a in objects for b in groups[target]):
                parts.append(1)
            else:
                right = False
                parts += [0, 1] if slip else [0]
        groups.append(objects if right else None)
    return sum(parts) / len(parts)


def rank(detection):
    return -detection.score


@pytest.mark.parametrize("slip", [False, True])
def test_the_graded_score_agrees_with_an_independent_reading_of_flow_grpos_server(slip):
    rng, seen_values = random.Random(1), set()
    for _ in range(2000):
        include = [{"class": name, "count": rng.choice((1, 1, 2, 3))} for name in rng.sample(("cat", "dog"), 2)]
        if rng.random() < 0.5:
            include[1]["position"] = [rng.choice(scene.RELATIONS), 0]
        for clause in include:  # GenEval asks for a colour or for a position, never for both
            if "position" not in clause and rng.random() < 0.5:
                clause["color"] = rng.choice(("red", "blue"))
        detections = [
            seen(
                rng.choice(("cat", "dog")),
                rng.choice((0.4, 0.5, 0.6, 0.7)),  # ties, also at the threshold
                rng.choice(("red", "red", "blue")),
                (rng.randrange(0, 48, 4), rng.randrange(0, 48, 4)),
                rng.choice((4, 8, 12)),
            )
            for _ in range(rng.randrange(1, 7))
        ]
        value = judge(asked(*include), detections, 0.5, half_credit=slip).graded
        assert value == pytest.approx(by_the_server(asked(*include), detections, 0.5, slip), abs=1e-12)
        seen_values.add(round(value, 6))
    assert len(seen_values) > 25


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


# ---- detectors for photographs ----


def test_the_detector_is_a_name_or_a_block_and_the_embedded_one_by_default():
    assert GenEval.Config() == GenEval.Config(detector="embedded") == GenEval.Config(detector={"kind": "embedded"})
    assert GenEval.Config(detector="mask2former").detector == Masks.Config()
    assert GenEval.Config(detector={"kind": "detr", "path": "a/b"}).detector == Boxes.Config(path="a/b")
    assert isinstance(GenEval.Config().detector, Embedded.Config)


def test_verdicts_of_the_embedded_detector_are_as_before_there_were_others():
    graded = scored(RECORDS, MIXED_UP).values
    np.testing.assert_array_equal(graded, [*[1.0] * 9, *[0.0] * 8, 0.25, *[np.nan] * 3])
    for threshold in (None, 0.5):  # counting has no threshold of its own
        result = scored(RECORDS, MIXED_UP // 2 + IMAGES[::-1] // 2, threshold=threshold)
        found = detect(MIXED_UP // 2 + IMAGES[::-1] // 2)
        for name in ("accuracy", "strict", "graded"):
            expected = [
                getattr(judge(r, f, threshold or 0.8), name) if r["include"] else np.nan
                for r, f in zip(RECORDS, found, strict=True)
            ]
            np.testing.assert_array_equal(result.details[name], expected)


CLAUSES = [{"class": "cat", "count": 2, "color": "red"}, {"class": "dog", "count": 1}, {**CAT, "color": "blue"}]


def test_colours_are_named_for_the_surest_objects_of_clauses_that_ask_for_one():
    cats = [seen("cat", score) for score in (0.6, 0.9, 0.8)]
    found = strongest([*cats, seen("dog")], 0.5)
    assert colored(CLAUSES, found) == [cats[1], cats[2]]
    assert colored(CLAUSES[:1], strongest(cats[:1], 0.5)) == []  # too few: no verdict depends on their colour
    assert colored(CLAUSES[1:2], found) == []


@pytest.fixture(scope="module")
def photographs(detector_folders, color_clip):
    """A function from settings to a loaded reward on the tiny checkpoints, read by path."""

    def load(kind="mask2former", folder="mask2former", **settings):
        detector = {"kind": kind, "path": str(detector_folders[folder])}
        reward = GenEval(GenEval.Config(detector=detector, color_clip=str(color_clip), **settings))
        reward.load("cpu", 1)
        return reward

    return load


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 5, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((52, 40), 0)) for c in coarse])


def prompt(task, *include):
    return Prompt(0, task, {**asked(*include), "tag": task})


def tally(detections, above):
    return Counter(d.label for d in detections if d.score > above)


def test_photographs_count_above_the_published_thresholds(photographs, noise):
    reward = photographs(score="strict")
    seen_tasks = Counter()
    for image, detections in zip(noise[:3], reward.detector.detect(noise[:3], 0.1), strict=True):
        for label, count in tally(detections, 0.3).items():
            sure = tally(detections, 0.9)[label]
            for task, expected in (("two_object", 1), ("counting", float(sure == count))):
                value = reward.score(image[None], [prompt(task, {"class": label, "count": count})]).values[0]
                assert value == expected
                seen_tasks[task, value] += 1
    assert seen_tasks["two_object", 1] > 5 and seen_tasks["counting", 0] > 5, seen_tasks
    image, label = noise[:1], reward.detector.detect(noise[:1], 0.3)[0][0].label
    count = tally(reward.detector.detect(noise[:1], 0.6)[0], 0.6)[label]
    own = photographs(score="strict", threshold=0.6, counting_threshold=0.6)
    for task in ("two_object", "counting"):
        assert own.score(image, [prompt(task, {"class": label, "count": max(count, 1)})]).values[0] == (count > 0)


@pytest.mark.parametrize(("kind", "folder"), [("mask2former", "mask2former"), ("detr", "rt_detr")])
def test_colours_of_photographs_are_those_of_their_cutouts(photographs, color_clip, noise, kind, folder):
    reward, namer = photographs(kind, folder), ColorNamer(str(color_clip), "cpu")
    names = set()
    for image, detections in zip(noise, reward.detector.detect(noise, 0.3), strict=True):
        picture = Image.fromarray(image)
        for label in sorted({d.label for d in detections}):
            surest = next(d for d in detections if d.label == label)
            cut = picture
            if kind == "mask2former":
                cut = Image.composite(picture, Image.new("RGB", picture.size, "#999"), Image.fromarray(surest.mask))
            (name,) = namer([np.asarray(cut.crop(surest.box))], [label])
            other = "red" if name != "red" else "blue"
            clauses = [{"class": label, "count": 1, "color": color} for color in (name, other)]
            result = reward.score(np.stack([image, image]), [prompt("colors", clause) for clause in clauses])
            assert result.details["accuracy"].tolist() == [1, 0]
            names.add(name)
    assert len(names) > 1


def test_a_batch_of_photographs_scores_as_its_images_do_one_by_one(photographs, noise):
    reward = photographs()
    labels = [objects[0].label for objects in reward.detector.detect(noise, 0.3)]
    prompts = [
        prompt("color_attr", {"class": labels[i], "count": 1, "color": "red"}, {"class": labels[i - 1], "count": 2})
        for i in range(len(noise))
    ]
    prompts[2] = Prompt(2, "a poem")
    batch = reward.score(noise, prompts)
    singles = [reward.score(noise[i : i + 1], prompts[i : i + 1]) for i in range(len(noise))]
    np.testing.assert_array_equal(batch.values, [single.values[0] for single in singles])
    assert batch.valid.tolist() == [True, True, False, True, True, True] and len(set(batch.values[batch.valid])) > 1


def test_a_batch_of_right_and_wrong_images_scores_as_they_do_one_by_one():
    batch = scored(RECORDS, MIXED_UP).values
    singles = [scored([record], MIXED_UP[i : i + 1]).values[0] for i, record in enumerate(RECORDS)]
    np.testing.assert_array_equal(batch, singles)
    assert len(set(batch[np.isfinite(batch)].tolist())) > 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"include": [{"class": "circle"}]}, "include.0.count: field required"),
        ({"include": [{"class": "circle", "count": 0}]}, "include.0.count: .*greater than or equal to 1, got 0"),
        ({"include": [{"class": "circle", "count": -1}]}, "include.0.count: .*greater than or equal to 1, got -1"),
        ({"include": [{"class": "circle", "count": 1.5}]}, "include.0.count: .*valid integer"),
        ({"include": [{"class": 3, "count": 1}]}, "include.0.class: .*valid string"),
        ({"include": [{"class": "circle", "count": 1, "position": ["above", 4]}]}, "include.0.position names clause 4"),
        ({"include": [{"class": "circle", "count": 1, "position": "above"}]}, "include.0.position"),
        ({"include": "circle"}, "include: .*valid list"),
        ({"include": 0}, "include: .*valid list"),
        ({"include": [{"class": "circle", "count": 1}], "exclude": [{"class": "circle"}]}, "exclude.0.count"),
        ({"include": [{"class": "circle", "count": 1}], "tag": 7}, "tag: .*valid string"),
    ],
)
def test_a_record_that_breaks_the_format_fails_alone_by_the_name_of_its_field(wrong, named):
    reward = GenEval(GenEval.Config())
    reward.load("cpu", 1)
    good = [Prompt(i, record["prompt"], record) for i, record in enumerate(RECORDS[:2])]
    result = reward.score(IMAGES[:3], [good[0], Prompt(9, "a circle", wrong), good[1]])
    assert result.failure.kind == "bad_input" and result.failure.rows == (1,)
    assert re.match(f"metadata of 'a circle': {named}", result.failure.message)
    assert result.valid.tolist() == [True, False, True] and np.isnan(result.values[1])
    assert result.values[0] == scored(RECORDS[:1], IMAGES[:1]).values[0]
