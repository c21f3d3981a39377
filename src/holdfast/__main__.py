"""`python -m holdfast`, the same as `holdfast`: for `accelerate launch -m holdfast train recipe.yaml`."""

from .cli import main

if __name__ == "__main__":
    main()
