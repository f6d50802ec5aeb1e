"""The story of a model that nobody prepared, in the order in which it happens.

1. *Compiling.* Dynamo hands a graph to `compile.backend`, and `compile.rewrite` runs the pass
   `adopt_linear` over it, with an `adopter.Adopter`. Of each weight that a plain linear reads,
   `eligibility.EligibilityCheck` says what `prepare` would say of it, once the garbage collector
   has told which module owns the weight. An eligible one gets a state, an
   `OrthogonalEquivalence` at the identity, as new inputs of the graph. `registry.adopted` holds
   the states by their weights, and nothing in the model has changed yet.
2. *Each call.* The compiled code looks the states up and creates those that are missing, because
   a second instance of the model reuses the code without calling the backend. Its outputs are
   hooked (`awaiting.at_the_end_of_backward`).
3. *The first backward* goes through these outputs. Their weights then await settling
   (`awaiting`), and a callback of the autograd engine calls `settling.settle` at the end.
   Compiled autograd runs no such callback: there it happens before the next step of any
   optimiser (`Before.SETTLE`).
4. *Settling.* Every weight is checked again, for this instance. `layers.prepare.move_adopted`
   makes the states the parametrizations of their linears, gradients included, under the
   permutation groups that `prepare` would have chosen. `optim.takeover` regroups the optimisers
   that hold the weights and attaches a merge schedule to each.
5. *The next call.* Dynamo sees a prepared model and compiles it once more, as such. Optimisers
   built later take their rotations over at their first step (`Before.OWN`, `optim.watch`).
"""
