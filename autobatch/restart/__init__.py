"""Process that starts a script, and starts it again when memory has killed it. Standard library only.

``supervisor`` runs the whole, ``child`` is one process of the script, ``memory_signs`` sees what memory there was,
``judgement`` decides what a death means, ``orphans`` ends what a dead script has left running.

A restart is worth its time only if the next run goes another way. So every rule errs on one side: a death without a
sign of memory is taken for a bug of the script's, and is passed on.
"""
