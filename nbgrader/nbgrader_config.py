"""nbgrader for a class that takes this course. nbgrader reads this file several times a command, so it has no side
effects.

Run nbgrader in this folder. Everything else in it is generated: `source/NN_slug/NN_slug.ipynb` comes from `solutions/`,
and assignment and notebook share the chapter's name.
"""

from vlm_course.build.student import CODE_STUB

c = get_config()  # noqa: F821  nbgrader defines it

c.CourseDirectory.course_id = "vlm"
c.ClearSolutions.code_stub = CODE_STUB
c.Execute.timeout = 300  # seconds a cell; the default of 30 is short for a chapter on a slow machine
c.OverwriteCells.add_missing_cells = True  # a deleted check cell scores 0 and does not wait for a person
c.IgnorePattern.enabled = True  # a warning on stderr must not cost the points of a correct answer
c.IgnorePattern.pattern = "Warning"
