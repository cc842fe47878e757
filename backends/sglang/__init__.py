"""SGLang: the engine in this process, its child process, and the loader of weights there."""
