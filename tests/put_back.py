"""Values put back between trainings of one model: the second training uses the traces of the first."""

from __future__ import annotations


def putting_back(model, *optimizers):
    """Return a function that gives a model and its optimizers the values that they have now, and its metrics none.

    An optimizer has its slots from the beginning then, and not from the first update.
    """
    for optimizer in {id(each): each for each in (model.optimizer, *optimizers)}.values():
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    owners = (model, model.optimizer, *optimizers)
    values = {id(variable): (variable, variable.numpy()) for owner in owners for variable in owner.variables}

    def put_back():
        for variable, value in values.values():
            variable.assign(value)
        model.reset_metrics()

    return put_back
