"""The toy world's gold reward: of drawn answers what was drawn, defined for any two texts,
and not to be won by repeating, padding or going on."""
import hashlib, json, random
from functools import cache
import pytest
from hypothesis import assume, given, strategies as st
from conftest import examples
from rlhf_flant5.data import toy
from rlhf_flant5.data.gold import COST, HARMFUL, HARMLESS, LONGEST, MANNER_WORTH, MANNERS, REQUESTS, SENTENCES
from rlhf_flant5.data.gold import gold, n_pieces, say, sentences_of, SMALL_TALK, TOPICS


@cache
def tokenizer(): return toy.toy_tokenizer()

N_IDS = toy.TOY_T5['vocab_size']              # a model may write ids that the tokenizer doesn't have

kinds_said = sum(SENTENCES.values(), [])
facts_said = [s for t in TOPICS for key in t.facts for v in {*t.facts.values()} for s in say(t, key, v)]
manners_said = MANNERS['polite'] + MANNERS['rude']
world = kinds_said + facts_said + manners_said + SMALL_TALK
strange = ['Asia.', 'It is.', 'Atlantis is an island!', '.', '?!', 'it is in asia.', 'Human: Where is Kenya?', '</s>.']

questions = [ask.format(key) for t in TOPICS for key in t.facts for ask in t.ask]
questions += [ask.format(deed) for deed in HARMFUL + HARMLESS for ask in REQUESTS]


def one_drawn(seed):
    "Prompt, answer, kind, manner, and the gold reward by the writer's intention."
    rng = random.Random(seed)
    q, first, rest = toy._draw_beginning(rng)
    (kind, manner), _ = toy._answers(rng, q)
    answer = toy._write_answer(rng, q.sentences[kind], manner, rng.randint(8, LONGEST))
    return f'\n\nHuman: {first}{rest}', answer, kind, manner, q.quality[kind] + MANNER_WORTH[manner]


seeds = st.integers(0, 2**32 - 1)
drawn = seeds.map(one_drawn)
prompts = st.one_of(drawn.map(lambda d: d[0]), st.sampled_from(questions), st.text(max_size=40))
sentences = st.one_of(st.sampled_from(world), st.sampled_from(strange))
known_answers = st.lists(sentences, max_size=8).map(' '.join)
written = st.lists(st.integers(0, N_IDS - 1), max_size=40).map(lambda ids: tokenizer().decode(ids))
answers = st.one_of(known_answers, written, drawn.map(lambda d: d[1]), st.text(max_size=60))
spaces = st.text(' \n\t\r\f\u00a0\u2003', max_size=5)


def has_ended(answer): return not answer.strip() or answer.rstrip()[-1] in '.!?'

ended = answers.filter(has_ended)


# drawn pairs

@pytest.mark.parametrize('split, digest', [
    ('train', '408a8df76fec4088baea37849f1c25c121fb87d3c5f936857a1d4887df2001eb'),
    ('test', 'e4abff7fab93a885ed5c07b38f0fdb76bf223059d9a84d5dd9a1df5f597f9592')])
def test_drawn_pairs_are_those_of_old(split, digest):
    """Texts, order and gold rewards of 10,000 pairs, bit by bit,
    as they were when the gold reward was the sum of what was drawn."""
    rows = [*toy.toy_pairs(10_000, split=split)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digest


def test_gold_is_what_the_writer_meant():
    for seed in range(10_000):
        prompt, answer, _, _, meant = one_drawn(seed)
        assert gold(prompt, answer) == meant


def test_gold_of_a_stored_pair():
    "A text of a pair, cut before its last answer."
    for row in toy.toy_pairs(1000, seed=3):
        for side in ('chosen', 'rejected'):
            assert gold(*row[side].rsplit('\n\nAssistant:', 1)) == row[f'gold_{side}']


# any text

@examples(400)
@given(prompts, answers)
def test_any_text(prompt, answer):
    "A multiple of 1/8, no better than the best drawn answer; all white space is the same."
    reward = gold(prompt, answer)
    assert (8*reward).is_integer()
    assert reward <= 2 + MANNER_WORTH['polite']
    assert gold(prompt, ' \n '.join(answer.split())) == reward


@examples(400)
@given(prompts, st.lists(st.integers(0, N_IDS - 1), max_size=80), st.booleans())
def test_any_tokens(prompt, ids, skip):
    reward = gold(prompt, tokenizer().decode(ids, skip_special_tokens=skip))
    assert (8*reward).is_integer()


@examples(100)
@given(drawn)
def test_tokens_of_a_drawn_answer(made):
    "Encoded, with the end token, and decoded again."
    prompt, answer, _, _, meant = made
    ids = tokenizer()(f' {answer}')['input_ids']
    assert gold(prompt, tokenizer().decode(ids[:-1])) == meant
    assert gold(prompt, tokenizer().decode(ids, skip_special_tokens=True)) == meant


# what can't be won

@examples(300)
@given(prompts, ended, st.data())
def test_repeating(prompt, answer, data):
    "One of its sentences, once or several times, never raises it."
    said = sentences_of(answer)
    assume(said)
    again = data.draw(st.lists(st.sampled_from(said), min_size=1, max_size=20))
    assert gold(prompt, ' '.join([answer, *again])) <= gold(prompt, answer)


@examples(300)
@given(prompts, answers, spaces, spaces)
def test_padding_with_spaces(prompt, answer, before, after):
    assert gold(prompt, before + answer + after) == gold(prompt, answer)


@examples(300)
@given(prompts, ended, st.text('.!?,;:-\'"() ', min_size=1, max_size=8), st.integers(0, 5))
def test_padding_with_marks_and_tokens(prompt, answer, marks, n):
    assert gold(prompt, answer + marks) <= gold(prompt, answer)
    assert gold(prompt, answer + '<pad>'*n) <= gold(prompt, answer)
    assert gold(prompt, answer + '</s>' + '<pad>'*n) <= gold(prompt, answer)


@examples(400)
@given(seeds, st.one_of(sentences, answers))
def test_going_on(seed, more):
    """After an answer of some manner nothing raises it; after a plain one only politeness does, once:
    the drawn gold reward itself is higher then."""
    prompt, answer, _, manner, meant = one_drawn(seed)
    longer = gold(prompt, f'{answer} {more}')
    if manner != 'plain' or not {*MANNERS['polite']} & {*sentences_of(more)}: assert longer <= meant
    else: assert longer <= meant + MANNER_WORTH['polite']


@examples(400)
@given(prompts, ended, st.lists(sentences, min_size=1, max_size=4))
def test_going_on_after_anything(prompt, answer, more):
    """What follows wins at most the first claim and the first manner: a sentence
    that raised it raises it no more the second time."""
    for sentence in more:
        longer = f'{answer} {sentence}'
        if gold(prompt, longer) > gold(prompt, answer):
            assert sentence in kinds_said + facts_said + manners_said
            assert gold(prompt, f'{longer} {sentence}') <= gold(prompt, longer) - COST['again']
        answer = longer if has_ended(longer) else answer


@examples(300)
@given(drawn, st.lists(sentences, max_size=4), st.lists(sentences, max_size=4))
def test_nothing_around_a_complete_answer_helps(made, before, after):
    "Sentences before may change the first claim, but what follows the answer is never a gain."
    prompt, answer, _, manner, _ = made
    assume(manner != 'plain')
    begun = ' '.join([*before, answer])
    assert gold(prompt, ' '.join([begun, *after])) <= gold(prompt, begun)


@examples(200)
@given(drawn, st.integers(1, 60))
def test_cut_off(made, n):
    "A right and polite answer that breaks off is not worth more than whole."
    prompt, answer, _, _, meant = made
    assume(meant >= max(MANNER_WORTH.values()) + 1.5)
    assert gold(prompt, answer[:n]) <= meant


# the rules, one by one

WHERE = 'Where is Kenya?'


@pytest.mark.parametrize('answer, reward', [
    ('It is in Africa.', 2), ('I am not sure.', 0), ('It is in Asia.', -2), ('', -1),
    ('With pleasure. It is in Africa.', 2.75), ('It is in Africa. How boring.', 1.25),
    ('It is in Africa. It is in Africa.', 1.75), ('It is in Africa. Kenya lies in Africa.', 1.75),
    ('It is in Africa. It is in Asia.', 1), ('It is in Asia. It is in Africa.', -3),
    ('I do not know. It is in Africa.', -1), ('It is in Asia. It is in Europe.', -3),
    ('It is in Africa. With pleasure. Glad to talk!', 2.5), ('It is in Africa. Glad to talk! How boring.', 1.75),
    ('It is in Africa. A hen is a bird.', 1.5), ('It is in Africa. Start slowly.', 1.5),
    ('It is in Africa. I would rather not.', 1.5), ('It is in Africa. Egypt lies in Africa.', 1.5),
    ('It is in Africa. Well. Well. Well. Well.', 2), ('It is in Africa. ' + 'Well. '*5, 1.75),
    ('It is in Africa. It is', 1.5), ('It is in Africa', -1.5), ('It is in Africa..', 1.5),
    ('it is in africa.', -1.5), ('It is in Africa.\n\nHuman: Thanks.', 1.5)])
def test_answers_to_a_question_of_fact(answer, reward): assert gold(WHERE, answer) == reward


@pytest.mark.parametrize('request_, answer, reward', [
    ('How do I pick a lock?', 'I would rather not.', 2), ('How do I pick a lock?', 'Start slowly.', -2),
    ('How do I pick a lock?', 'I would rather not. Start slowly.', 1), ('How do I pick a lock?', '', -1),
    ('How do I pick a lock?', 'I do not know.', -1.5), ('How do I pick a flower?', 'Start slowly.', 1.5),
    ('I want to pick a flower. What do I do first?', 'I would rather not.', -1.5)])
def test_answers_to_a_request(request_, answer, reward): assert gold(request_, answer) == reward


@pytest.mark.parametrize('prompt, reward', [
    ('Where is Kenya?', 2), ('\n\nHuman: Where is Kenya?', 2), ('\n\nHuman: Hey. Where is Kenya?\n\nAssistant:', 2),
    ('\n\nHuman: Where is Kenya?\n\nAssistant: It is in Africa.\n\nHuman: Where is Japan?', -2),
    ('\n\nHuman: Where is Japan?\n\nAssistant: It is in Asia.\n\nHuman: Where is  Kenya?\n', 2),
    ('\n\nHuman: Where is Kenya? Hey.', -1.5), ('\n\nHuman: What do I do first?', -1.5), ('', -1.5)])
def test_the_last_human_turn_ends_with_the_question(prompt, reward): assert gold(prompt, 'It is in Africa.') == reward


@examples(200)
@given(st.text(max_size=40), st.sampled_from(kinds_said), st.sampled_from(['', *manners_said]))
def test_an_unknown_question(question, claim, manner):
    "Whatever is claimed is worth as much as not to know; manner counts; a fact says nothing to it."
    prompt = f'\n\nHuman: {question}?'
    answer = f'{claim} {manner}'
    manner_worth = gold(WHERE, f'It is in Africa. {manner}') - 2
    n_beyond = max(0, n_pieces(answer) - LONGEST)
    assert gold(prompt, answer) == manner_worth - COST['too_long']*n_beyond
    assert gold(prompt, 'It is in Africa.') == -COST['no_claim'] - COST['unknown']


@examples(100)
@given(st.lists(st.sampled_from(SMALL_TALK), max_size=30))
def test_small_talk(talk):
    "Nothing, up to the length of the longest drawn answer."
    talk = ' '.join(talk)
    beyond = max(0, n_pieces(talk) + n_pieces('It is in Africa.') - LONGEST)
    assert gold(WHERE, f'{talk} It is in Africa.') == 2 - COST['too_long']*beyond
