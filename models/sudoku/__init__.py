"""Sudoku: boards with one solution, 9x9, 6x6 and 4x4; how many steps a board takes shows only in solving it."""
