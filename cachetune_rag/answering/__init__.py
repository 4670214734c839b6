"""From a caller's words to an answer and its report: admit, execute, decode, stream."""
