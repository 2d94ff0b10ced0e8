import pytest


@pytest.fixture
def day(tmp_path):
    """A day of two functions with a peak, in the layout of Azure Functions 2019."""
    path = tmp_path / "day.csv"
    minutes = range(1, 1441)
    counts = [10 + 30 * (700 < m < 720) for m in minutes]
    head = ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, minutes)])
    path.write_text("\n".join([head, *(",".join(["o", "a", f, "http", *map(str, counts)]) for f in "xy")]) + "\n")
    return path
