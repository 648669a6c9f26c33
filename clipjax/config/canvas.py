"""Rules of `data.resize_on=device` across fields."""

from clipjax.config.data import DataConfig, ResizeOn

_ON_HOST = ("color_jitter_probability", "grayscale", "erasing")  # they change the resized picture


def canvas_errors(data: DataConfig, image_size: int) -> list[str]:
    """Return what is wrong with the place of the resizing, a line each.

    Args:
        data: of the run.
        image_size: of the model.
    """
    if data.resize_on is ResizeOn.HOST:
        if data.canvas_size == DataConfig().canvas_size:
            return []
        return [f"data.canvas_size={data.canvas_size} would be ignored: set data.resize_on=device, or leave it out"]
    errors = [
        f"data.augment.{name}={value} changes resized pictures on the host, which data.resize_on=device does not make; "
        "leave it 0, or use data.resize_on=host"
        for name in _ON_HOST
        if (value := getattr(data.augment, name))
    ]
    if data.canvas_size < image_size:
        errors.append(
            f"data.canvas_size={data.canvas_size} must be at least model.image.image_size={image_size}: all pictures "
            "would be reduced below it"
        )
    return errors
