"""How arms look: colour, dash pattern and marker, told apart without colour too.

Colours have names. In the page a name is a CSS variable with a light and a dark value, so one
drawing serves both; in a PNG it is the light value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Theme = Literal["light", "dark"]
Palette = Mapping[str, str]

# (light, dark). Contrast with the paper is at least 4.5 for ink, muted and every arm.
COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e9e7e2"),
    "muted": ("#5d6570", "#a3acb8"),
    "grid": ("#dedcd6", "#323941"),
    "paper": ("#fcfbf9", "#14181c"),
    "tell": ("#0a5fb4", "#6cb4ff"),
    "sft": ("#bf3f0c", "#ff9b61"),
    "matched": ("#846200", "#e3c34d"),
    "general": ("#1a7a4c", "#5fcf95"),
    "base": ("#5b6570", "#a9b3bf"),
    "violet": ("#7440ad", "#c4a0f5"),
    "rose": ("#b0246c", "#f68abb"),
    "teal": ("#0b7680", "#57cdd7"),
    "brown": ("#7c5230", "#d5ab80"),
    "olive": ("#5d6b12", "#b9cb55"),
}

# Stand-ins that a drawing carries until its colours become variables: never used otherwise.
SENTINELS: Palette = {name: f"#01fe{place:02x}" for place, name in enumerate(COLOURS, start=16)}
LIGHT: Palette = {name: light for name, (light, _) in COLOURS.items()}


@dataclass(frozen=True)
class ArmStyle:
    """Drawing style of an arm.

    Attributes:
        colour: Name in COLOURS.
        dashes: On and off lengths in points; empty for a solid line.
        marker: Matplotlib marker.
        width: Line width in points.
        place: Rank in legends and tables.
    """

    colour: str
    dashes: tuple[float, ...]
    marker: str
    width: float
    place: int


_STYLES: Mapping[str, ArmStyle] = {
    "tell": ArmStyle("tell", (), "o", 2.4, 0),
    "sft": ArmStyle("sft", (5, 2), "s", 2.0, 1),
    "sft_matched": ArmStyle("matched", (6, 2, 1.5, 2), "^", 1.8, 2),
    "tell_no_anchor": ArmStyle("violet", (2, 1.5), "D", 1.6, 3),
    "tell_random_anchor": ArmStyle("rose", (1, 1.5), "v", 1.6, 4),
    "tell_anchor_all": ArmStyle("teal", (4, 1.5, 1, 1.5, 1, 1.5), "P", 1.6, 5),
    "tell_task_first": ArmStyle("brown", (3, 3), ">", 1.6, 6),
    "tell_task_last": ArmStyle("olive", (8, 2), "<", 1.6, 7),
    "tell_diverse": ArmStyle("teal", (7, 1.5), "p", 1.6, 9),
    "tell_aligned": ArmStyle("violet", (5, 1.5, 1, 1.5), "H", 1.6, 10),
    "general_only": ArmStyle("general", (1.2, 1.6), "X", 1.8, 20),
    "base_few_shot": ArmStyle("base", (3, 1.5, 1, 1.5), "*", 1.5, 21),
    "base": ArmStyle("base", (6, 3), "d", 1.5, 22),
}
_BLOCKS = ArmStyle("rose", (6, 1.5, 1, 1.5), "h", 1.6, 8)
_OTHER = ArmStyle("muted", (2, 2), ".", 1.5, 30)

# The same markers in a box of 10 x 10, as SVG paths, for the legends of the page.
MARKER_PATHS: Mapping[str, str] = {
    "o": "M5 1.2a3.8 3.8 0 1 0 .01 0z",
    "s": "M1.6 1.6h6.8v6.8h-6.8z",
    "^": "M5 1l4.2 7.6h-8.4z",
    "v": "M5 9l4.2-7.6h-8.4z",
    ">": "M9 5l-7.6 4.2v-8.4z",
    "<": "M1 5l7.6 4.2v-8.4z",
    "D": "M5 .6l4.4 4.4-4.4 4.4-4.4-4.4z",
    "d": "M5 .4l2.8 4.6-2.8 4.6-2.8-4.6z",
    "P": "M3.6 1h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "X": "M3 1l2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2-2-2z",
    "*": "M5 .4l1.2 3.2 3.4.1-2.7 2.1 1 3.3-2.9-1.9-2.9 1.9 1-3.3-2.7-2.1 3.4-.1z",
    "h": "M5 .8l3.7 2.1v4.2l-3.7 2.1-3.7-2.1v-4.2z",
    "p": "M5 .8l4.2 3-1.6 5h-5.2l-1.6-5z",
    "H": "M.8 5l2.1-3.7h4.2l2.1 3.7-2.1 3.7h-4.2z",
    ".": "M5 3.4a1.6 1.6 0 1 0 .01 0z",
}


def style_of(arm: str) -> ArmStyle:
    """Return the drawing style of an arm; ``tell_blocks(k)`` share one."""
    if arm.startswith("tell_blocks"):
        return _BLOCKS
    return _STYLES.get(arm, _OTHER)


def css_variables(theme: Theme) -> str:
    """Return the declarations ``--name: colour;`` of one theme."""
    place = 0 if theme == "light" else 1
    return " ".join(f"--{name}: {values[place]};" for name, values in COLOURS.items())
