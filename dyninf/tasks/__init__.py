"""Long-context tasks with known answers: made of text or of tokens, scored under any plan. Nothing is downloaded.

Text: :func:`make_samples` and :func:`load_or_make`. Tokens: :func:`draw`, :func:`mixture` and :func:`to_samples`.
Scores: :func:`evaluate_task`, :func:`forced_accuracy`, :func:`position_nll`, :func:`attention_mass_recall` and
:func:`output_error`.
"""

from dyninf.tasks.measures import attention_mass_recall as attention_mass_recall
from dyninf.tasks.measures import keep_most_attended as keep_most_attended
from dyninf.tasks.measures import kept_per_head as kept_per_head
from dyninf.tasks.measures import output_error as output_error
from dyninf.tasks.position_nll import PositionNLL as PositionNLL
from dyninf.tasks.position_nll import position_nll as position_nll
from dyninf.tasks.sample import Sample as Sample
from dyninf.tasks.score import SampleResult as SampleResult
from dyninf.tasks.score import TaskResult as TaskResult
from dyninf.tasks.score import evaluate_task as evaluate_task
from dyninf.tasks.score import forced_accuracy as forced_accuracy
from dyninf.tasks.score import score_answers as score_answers
from dyninf.tasks.stored import load_or_make as load_or_make
from dyninf.tasks.suite import TASKS as TASKS
from dyninf.tasks.suite import make_samples as make_samples
from dyninf.tasks.token_counting import Common as Common
from dyninf.tasks.token_counting import Frequent as Frequent
from dyninf.tasks.token_needles import Needles as Needles
from dyninf.tasks.token_tracking import Tracking as Tracking
from dyninf.tasks.tokens import TOKEN_TASKS as TOKEN_TASKS
from dyninf.tasks.tokens import TokenBatch as TokenBatch
from dyninf.tasks.tokens import draw as draw
from dyninf.tasks.tokens import mixture as mixture
from dyninf.tasks.tokens import to_samples as to_samples
from dyninf.tasks.vocabulary import Vocabulary as Vocabulary
