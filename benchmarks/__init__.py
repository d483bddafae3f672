"""Side-by-side measurements with transformers' Mask2Former; each module is a program."""
