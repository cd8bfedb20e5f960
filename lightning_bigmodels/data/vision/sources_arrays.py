"""Pictures in arrays: scikit-learn's digits, NumPy files, and the format of MNIST."""

import numpy as np

from lightning_bigmodels.data.vision.labelled import Labelled, labelled
from lightning_bigmodels.data.vision.pictures import ArrayPictures
from lightning_bigmodels.errors import require


def read_digits() -> Labelled:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8, their 16 shades spread over 0 to 255."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    shades = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return labelled(ArrayPictures("sklearn-digits", shades), [str(label) for label in digits.target])
