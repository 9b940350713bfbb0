"""Table 2 as published: accuracy in per cent, mean and standard deviation over 5 seeds.

The accuracies are those on the test images. By the paper's caption, those for SVHN are on the validation
images.
"""

_COLUMNS = (
    "cifar10/resnet20",
    "cifar10/resnet18",
    "cifar10/vgg16",
    "cifar100/resnet18",
    "cifar100/vgg16",
    "svhn_cropped/resnet18",
    "svhn_cropped/vgg16",
)
_ROWS = {
    "adam": "90.98 0.06  93.77 0.20  92.83 0.17  71.30 0.36  68.43 0.16  95.32 0.23  95.57 0.20",
    "adamw": "90.19 0.24  93.61 0.12  92.53 0.25  67.39 0.27  71.37 0.22  95.13 0.15  94.97 0.08",
    "adamg": "91.64 0.17  94.67 0.12  93.41 0.17  73.76 0.34  70.17 0.20  95.73 0.05  95.70 0.25",
    "adams": "91.15 0.11  93.95 0.23  92.92 0.11  74.44 0.22  68.73 0.27  95.75 0.09  95.66 0.09",
    "adamst": "91.92 0.18  95.11 0.10  93.89 0.09  76.15 0.25  71.53 0.19  96.05 0.12  96.22 0.09",
    "adamsrt": "91.81 0.20  94.92 0.05  93.75 0.06  75.28 0.35  71.45 0.13  95.84 0.07  95.82 0.05",
}


def _parse_row(row: str) -> list[tuple[float, float]]:
    numbers = list(map(float, row.split()))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


# (column, method) -> mean, standard deviation
TABLE2 = {
    (column, method): cell
    for method, row in _ROWS.items()
    for column, cell in zip(_COLUMNS, _parse_row(row), strict=True)
}
