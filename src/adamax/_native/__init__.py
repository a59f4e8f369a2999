"""The native core: the verbs for the CPU, in C++, as the extension module ``verbs``."""
