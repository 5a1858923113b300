"""What a run shows, for people: one HTML page, one picture, one table. Reads run directories, writes nothing else.

run.py          a run directory, read into one object
page.py         the page and its words (page.css, page.js); markup.py: elements that escape what is in them
dag.py          the recipe as a picture; layers.py and spread.py: where its boxes go
curves.py       which curves there are; charts.py and scale.py: how a curve is drawn
tables.py       the stage table and the seconds; measures.py: the table's columns
transcripts.py  completions side by side
export.py       the picture and the markdown table of the README
"""

from r1fast.report.export import markdown_table, write_picture
from r1fast.report.page import write_report

__all__ = ["markdown_table", "write_picture", "write_report"]
