"""One colour for each class, the same wherever classes are drawn."""

NUM_COLORS = 256
IGNORED_COLOR = (255, 255, 255)
"""What stands for pixels that no class is known of."""


def class_color(index: int) -> tuple[int, int, int]:
    """Return red, green and blue of a class; 0, most often the background, is black.

    Source: the map of the Pascal VOC development kit (Everingham et al. 2010), in which bits 0, 3, 6, ... of the index
    are the high bits of red, the ones beside them those of green and blue.
    """
    color = [0, 0, 0]
    for level in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * level + channel) & 1) << (7 - level)
    return color[0], color[1], color[2]


def class_palette() -> list[int]:
    """Return red, green and blue of the classes 0 to 255 in a row, as palettes of PNG files are given."""
    return [value for index in range(NUM_COLORS) for value in class_color(index)]
