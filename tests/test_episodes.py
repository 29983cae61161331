"""What a text says about episodes."""

import pytest

from craft_optim.episodes import chosen_episodes, parse_episodes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("2", [0, 1]),
        ("6", [0, 1, 2, 3, 4, 5]),
        ("[4, 0,2]", [0, 2, 4]),
        ("4:", [4, 5]),
        ("-2:", [4, 5]),
        (":-4", [0, 1]),
        ("1:20", [1, 2, 3, 4, 5]),
        ("::4", [0, 4]),
        ("::-4", [1, 5]),
        ([5, 1], [1, 5]),
        ((0,), [0]),
    ],
)
def test_what_is_selected_of_six(text, found):
    assert chosen_episodes(text, 6, "data") == found


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "x", "1.5", "[]", "[1, x]", "[1.0]", "[true]", "1:2:3:4", "::0", "1;2"]
)
def test_texts_that_say_nothing(text):
    with pytest.raises(ValueError, match=r"`episodes` must be the first N.*Found") as raised:
        parse_episodes(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("episodes", ["[1, 1]", "[-1]", [2, 2], [0, -1]])
def test_numbers_below_zero_and_twice(episodes):
    with pytest.raises(ValueError, match=r"numbers >= 0, each once; the last ten are -10:"):
        chosen_episodes(episodes, 6, "data")


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ("7", r"data has 6 episodes, 0 to 5. Found `episodes`=7, 6 among them"),
        ("[0, 9]", r"Found `episodes`=\[0, 9\], 9 among them"),
        ([8], r"Found `episodes`=\[8\], 8 among them"),
        ("6:", "Found `episodes`=6:, which is none of them"),
        ([], r"Found `episodes`=\[\], which is none of them"),
    ],
)
def test_episodes_that_are_not_there(episodes, message):
    with pytest.raises(ValueError, match=message):
        chosen_episodes(episodes, 6, "data")
