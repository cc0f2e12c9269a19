"""Tools for tests of overlap and of programs that embed it."""
