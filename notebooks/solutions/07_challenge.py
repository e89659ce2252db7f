"""Solutions of notebook 07."""


def utilization(prediction):
    return prediction.flops / (4 * 125e12 * prediction.seconds)


def energy(prediction):
    watts = 66 + (300 - 66) * (1 - prediction.bubble)
    return 4 * watts * prediction.seconds / 3.6e6
