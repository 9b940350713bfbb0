"""Which parameters of a function are radially invariant, found by measurement.

How the modules follow one another:

  - `random_points`: a function's outputs and gradients at random points near its parameters.
  - `radial_sums`: sums of x g, (x g)^2, x^2 and g^2 within the groups of any split of an array.
  - `splits`: the ways in which one array may split into groups.
  - `candidates`: the ways in which arrays with one parent may split together.
  - `evidence`: the figures of a candidate, and whether they say yes, no or neither.
  - `siblings`: of the arrays with one parent, the finest candidates that hold.
  - `find`: `find_spheres` and `survey_spheres`.
  - `check`: `check_spheres`, which scales the groups and looks at the change of the outputs.
  - `text_table`: reports as text.
"""
