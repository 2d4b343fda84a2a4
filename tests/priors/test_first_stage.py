"""What the scripts of priors share."""
import pytest

from harness.errors import UserError
from priors.first_stage import class_of

NUMBERED = sorted(map(str, range(12)))  # "0", "1", "10", "11", "2", ...


@pytest.mark.parametrize("text, classes, name", [
    ("2", NUMBERED, "2"), ("10", NUMBERED, "10"), ("dog", ["cat", "dog"], "dog"), ("1", ["cat", "dog"], "dog"),
    ("3", [f"{i} - a digit" for i in range(10)], "3 - a digit"), ("1", ["1", "0"], "1"), ("0", ["cat"], "cat")])
def test_a_class_is_given_by_name_and_else_by_number(text, classes, name):
    assert classes[class_of(text, classes)] == name


@pytest.mark.parametrize("text", ["2", "-1", "Dog", "", "1.0", "9" * 5000, "\u00b2", " dog"])
def test_what_is_no_class_is_refused(text):
    with pytest.raises(UserError, match="is no class: give a name, such as cat, dog, or a number from 0 to 1"):
        class_of(text, ["cat", "dog"])
    with pytest.raises(UserError, match="this data set has no classes"):
        class_of(text, [])
