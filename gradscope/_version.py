"""The version, said once: the build takes it from here.

It is not asked of the installed distribution, since ``importlib.metadata`` takes longer to import than a file to scan.
"""

__version__ = "0.1.0"
