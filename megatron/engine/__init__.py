"""DeepSpeed behind one small interface; the only package that imports it."""
