"""An effective learning rate that dies, on tasks one after another: see `__main__`."""
