"""The solvers' formulas, each a page that reads like its paper: a function of a `Trace` and a `Path`.

They are shared by the solvers of ``fastgen.samplers`` and by the stand-ins for diffusers' and k-diffusion's. ``start`` is the
step a trajectory begins with; what a multistep formula has not seen yet, it does without.
"""
