"""Methods that train a small update beside frozen weights."""
