"""The parts of examples/train.py: processes, data, settings, checkpoints, the loop, and what it shows."""


class Refused(Exception):
    """What was asked for makes no sense; the sentence names the argument. The program ends with code 2."""
