"""What built-in prompts ask: kinds of request, each in several forms. None of them is a form of bench/spec.py.

`{}` is a topic, `{name}` an entry of FILLINGS under that name, `{2..9}` a number. A slot that stands twice in a form is
filled twice, differently.
"""

from __future__ import annotations

from typing import Final

ABOUT: Final = {
    "explain": (
        "Explain {}.", "Explain {} in simple words.", "What is {}?", "What does one mean by {}?", "Tell me about {}.",
        "Explain {} and {manner}.", "I don't understand {}. Can you explain?", "What is the main idea behind {}?",
    ),
    "audience": (
        "Explain {} to {audience}.", "How would you describe {} to {audience}?", "Introduce {} to {audience}.",
        "I am talking to {audience}. How do I explain {}?", "Write a text on {} for {audience}.",
    ),
    "length": (
        "Describe {} in {one} sentence.", "Describe {} in {2..6} sentences.", "What is {}? Use at most {20..90} words.",
        "Tell me about {} in {2..5} paragraphs.", "In {2..4} sentences, what is special about {}?",
        "Give a one-paragraph overview of {}.", "Explain {} in exactly {3..9} bullet points.",
    ),
    "list": (
        "List {some} things that have to do with {}.", "Give me {some} facts about {}.",
        "Make a list of {some} {} terms.", "What are the {some} most important things to know about {}?",
        "Name {some} kinds or parts of {}.", "List {some} reasons to be interested in {}.",
        "Give {some} examples that show {} in everyday life.",
    ),
    "tips": (
        "Give me some tips on {}.", "What is the best advice on {}?", "I am new to {}. Where do I start?",
        "What mistakes do beginners make with {}?", "Share {some} practical tips about {} for {audience}.",
        "What are the do's and don'ts of {}?", "How can I get better at {skill}? Give me {some} tips.",
    ),
    "compare": (
        "Compare {} and {}.", "What is the difference between {} and {}?", "What do {} and {} have in common?",
        "Which matters more, {} or {}?", "Make a comparison of {} with {} in bullet points.", "{} vs {}",
        "Would you rather learn about {} or {}? Give reasons.",
    ),
    "story": (
        "Write a short story about {}.", "Tell me a {feeling} story about {}.", "Tell a bedtime story with {} in it.",
        "Write a {genre} story about {character} and {}.", "Invent a legend that explains {}.",
        "Write the first chapter of a {genre} novel. The hero is {name}, {job}.",
        'Write a story of {100..400} words that ends with the words "{ending}"',
    ),
    "poem": (
        "Write a poem about {}.", "Write a {feeling} poem on {}.", "Write a haiku about {}.",
        "Write a limerick about {}.", "Compose a rhyming poem of {two} verses about {}.",
        "Write a song about {} with a chorus.", "Write a rap about {}.", "Write a poem for {name} who is {job}.",
    ),
    "letter": (
        "Write a letter to a friend about {}.", "Write a letter from {character} to {character}.",
        "Write a letter to the mayor of {town} about {}.", "Write a thank-you note to {name} for {thing}.",
        "Write a letter of complaint about {thing} that broke after {2..9} days.", "Write a postcard from {place}.",
        "Write a letter to my future self about {}.", "Write a cover letter for a position as {job}.",
    ),
    "email": (
        "Write an email to {name} about {}.", "Write a {tone} email asking {name} for {request}.",
        "Draft an email to my boss: {excuse}.", "Write an email that invites colleagues to a talk on {} on {day}.",
        "Write a {tone} reply to an email from {name} who wants {request}.", "Write a subject line for an email on {}.",
        "Write an email to a customer named {name} whose order of {thing} is {2..12} days late.",
    ),
    "dialogue": (
        "Write a dialogue between {character} and {character} about {}.",
        "Write a conversation in a shop about {thing}.", "Write a dialogue in which {name} and {name} argue about {}.",
        "Write a short play about {}.", "Write a phone call between {name} and {job}.",
        "Write an interview with {job} about {}.",
    ),
    "review": (
        "Write a review of {thing}.", "Write a review of a book about {}.",
        "Write a {feeling} review of a restaurant in {town}.", "Write a {two}-star review of {thing}.",
        "Review a museum of {} as if you had been there.", "Write a review of a hotel in {place} by {character}.",
        "Write a review of an app that helps with {}.",
    ),
    "recipe": (
        "Invent a dish with {food} and {food} that {character} would like.", "Give me a recipe for {dish}.",
        "How do I make {dish}?", "What can I cook with {food} and {food}?",
        "Write a recipe for {dish} for {2..8} people.", "I have {food}, {food} and {food}. What is for dinner?",
        "How long does it take to make {dish}?", "What goes well with {dish}?", "How can I make {dish} healthier?",
        "Plan the meals of {day}, with {dish} for dinner.", "Give me a shopping list for {dish}.",
    ),
    "plan": (
        "Make a plan for {event}.", "Plan a trip of {2..9} days to {place}.", "Plan a lesson on {} for {audience}.",
        "Make a schedule for a day with time for {skill}, work and {}.", "Make a {two}-week plan to learn {skill}.",
        "Help me plan {event} for {4..60} people with a budget of {100..900} dollars.",
        "What should I see in {place} in {2..5} days?", "Write an agenda for a meeting about {}.",
    ),
    "steps": (
        "Give step by step advice on {}.", "How can {audience} learn to {task}?",
        "Walk me through {}, one step at a time.", "Give step by step instructions for {skill}.", "How do I {task}?",
        "How do I {task}? Go step by step.", "What are the steps to {task}?",
        "Write a guide to {skill} for {audience}.", "Show me how to {task}.", "What do I need to {task}?",
        "Write a checklist for someone who wants to {task}.",
    ),
    "works": (
        "How does {} work?", "Why do {} exist?", "How do {} come about?", "What causes {} to change?",
        "What happens behind the scenes with {}?", "Explain the mechanism of {} to {audience}.",
        "What is the science behind {}?", "What are the most important parts of {}, and what do they do?",
    ),
    "history": (
        "What is the history of {}?", "How did {} begin?", "How has {} changed over the last {20..300} years?",
        "Who were the key people in the history of {}?", "Make a timeline of {}.", "What were {} like in {1500..1990}?",
        "What did people once believe about {} that turned out to be wrong?", "Where does {} come from?",
    ),
    "future": (
        "What is the future of {}?", "What will {} be like in {2030..2150}?", "How will {} change {}?",
        "What would the world be like without {}?", "What if {} had never existed?",
        "Imagine {} in {place} in {2040..2100}.", "What would happen if everybody cared about {}?",
    ),
    "opinion": (
        "What do you think about {}?", "Is {} overrated?", "What is your opinion on {} and {}?", "Do you like {}?",
        "Should schools teach {}?", "Argue for {}.", "Argue against {}.", "Write a debate about {} with two sides.",
        "Convince {audience} that {} deserves attention.",
    ),
    "pros": (
        "List the pros and cons of {}.", "What are the advantages of {}?", "What are the disadvantages of {}?",
        "What are the benefits and risks of {} for {audience}?", "Should I buy {thing}? Weigh the pros and cons.",
        "Is it a good idea to live in {place}? Give arguments for both sides.",
    ),
    "quiz": (
        "Make a quiz of {two} questions about {}, with answers.", "Write a multiple choice question about {}.",
        "Test me on {}.", "Write {two} true or false statements about {} and say which are true.",
        "Make {two} flash cards on {}.", "Write an exam question on {} and a model answer.",
        "Give me a riddle about {}.",
    ),
    "faq": (
        "Write an FAQ about {}.", "What are the most common questions about {}? Answer them.",
        "Write {some} frequently asked questions on {} with short answers.", "Write a help page about {thing}.",
        "What do people usually ask about {}?",
    ),
    "headline": (
        "Write {some} headlines about {}.", "Write a catchy title for an article on {}.",
        "Write a news report about {}.", "Write a news story: {name}, {job} from {town}, wins a prize for {}.",
        "Suggest {some} titles for a book about {}.", "Write a blog post on {}.",
        "Write the introduction of an article about {}.",
    ),
    "slogan": (
        "Write a slogan for {}.", "Write an advertisement for {thing}.", "Find a name for a shop that sells {food}.",
        "Suggest {some} slogans for a company that makes {thing}.", "Write a radio commercial about {}.",
        "Name {some} possible brand names for {thing}.", "Write a motto for a club of people who love {}.",
    ),
    "post": (
        "Write a tweet about {}.", "Write a social media post on {} with hashtags.",
        "Write a caption for a photo of {}.", "Write a {tone} LinkedIn post about {}.",
        "Write a birthday message for {name} who is into {}.", "Write {some} short posts that announce {event}.",
        "Write a status update of {character} in {place}.",
    ),
    "product": (
        "Write an honest description of {thing} for {audience}.", "Write a product description of {thing}.",
        "Describe {thing} for an online shop.", "Write a {tone} description of {thing} that costs {5..400} dollars.",
        "What should I look for when I buy {thing}?", "List {some} features of {thing}.",
        "Invent a product that has to do with {} and describe it.",
    ),
    "speech": (
        "Write a speech about {}.", "Write a {feeling} speech for {event}.", "Write a toast to {name} at {event}.",
        "Write a speech of {two} minutes on {} for {audience}.", "Write an essay on {}.",
        "Write an essay that links {} to {}.", "Write the introduction and the conclusion of an essay on {}.",
    ),
    "brainstorm": (
        "Give me {some} ideas for a project on {}.", "Brainstorm {some} ways to use {thing}.",
        "What can I do about {}?", "Suggest {some} activities around {} for {audience}.",
        "Give me {some} gift ideas for {job}.", "Think of {some} business ideas about {}.",
        "I need names for {character}. Suggest {some}.", "What are creative ways to combine {} and {}?",
    ),
    "interview": (
        "What questions would you ask in an interview with {job}?",
        "Write {some} interview questions about {} with answers.",
        "I have an interview as {job} on {day}. How do I prepare?", "What does {job} do all day?",
        "What skills does {job} need?", "How do I become {job}?", "What is it like to be {job} in {place}?",
    ),
    "table": (
        "Make a markdown table of {some} facts about {}.", "Make a table that compares {} and {}.",
        "Make a table of {some} words about {} with their meanings.", "Show a weekly plan for {skill} as a table.",
        "Write a table with {two} columns on {}.", "Give a table of {food}, {food} and {food} with calories.",
    ),
    "words": (
        "Define {}.", 'What does "{vocabulary}" mean?', 'Use "{vocabulary}" in {two} sentences.',
        'Give me synonyms of "{vocabulary}".', 'What is the opposite of "{vocabulary}"?',
        'What is the difference between "{vocabulary}" and "{vocabulary}"?', "Write a dictionary entry for {}.",
        "Make a glossary of {some} terms around {}.",
    ),
    "roleplay": (
        "You are {character}. Tell me about {}.", "Pretend to be {job} and give me advice on {}.",
        "Act as {job}. I ask you about {}. What do you say?", "You are {character} in {place}. Describe your day.",
        "Speak like {character} and explain {}.", "Write a diary entry of {character} who discovers {}.",
    ),
    "metaphor": (
        "Explain {} with an analogy.", "How is {} like {}?", "Write a metaphor for {}.", "Tell me a joke about {}.",
        "Write a fun fact about {}.", "Write a proverb about {} and explain it.", "Describe the sound and smell of {}.",
        "Describe {place} to someone who cannot see.", "Describe a picture that shows {} and {}.",
    ),
    "problem": (
        "What are common problems with {}, and how are they solved?",
        "Give an example of a problem with {} and solve it.", "What are the dangers of {}?",
        "What can go wrong with {thing}?", "Why is {} difficult?", "How can {town} deal with {}?",
        "What are open questions about {}?", "What are some myths about {}?",
    ),
    "matter": (
        "Why is {} important?", "How does {} affect {}?", "What can {audience} learn from {}?",
        "What role does {} play in {place}?", "Why does {} matter today?", "Who needs to know about {}?",
        "What would you tell {job} about {}?", "What books or films about {} are there?",
        "What is interesting about {}?",
    ),
}  # fmt: skip
TASKS: Final = {
    "python": (
        "Write a Python program for {audience} that {coding}.", "Write a Python function that has to do with {}.",
        "Write a Python function that {coding}.", "Write Python code that {coding}.",
        "In Python, how do I write code that {coding}?", "Write a Python class for {entity}.",
        "Write a Python script that {coding}. Explain each line.",
        "Write a Python function that {coding}, with type hints and a docstring.",
        "Write unit tests for a function that {coding}.",
    ),
    "languages": (
        "Write a {programming} function that {coding}.", "Show me {programming} code that {coding}.",
        "How would you write this in {programming}: code that {coding}?",
        "Write a {programming} program with a class for {entity}.", "Write a small {programming} example of {concept}.",
        "What is {concept} in {programming}?",
    ),
    "web": (
        "Write an HTML page about {}.", "Write a JavaScript function that {coding}.",
        "Write HTML and CSS for {thing} in a shop.", "Write a web form that asks for {field}, {field} and {field}.",
        "Write CSS for a {tone} blog about {}.",
        "Write a JSON example that describes {entity} with {field} and {field}.",
    ),
    "sql": (
        "Write a SQL query that finds the {2..20} largest values of {field} in the table {table}.",
        "Write a SQL statement that creates a table {table} with {field}, {field} and {field}.",
        "I have a table {table} with columns for {field} and {field}. How do I count the rows per {field}?",
        "Write a SQL query that joins {table} and {table}.",
        "How do I delete rows of {table} older than {2..90} days in SQL?",
    ),
    "shell": (
        "Write a shell script for {job} that {shell}.", "Write a shell command that {shell}.",
        "How do I write a bash script that {shell}?", "Which Linux command {shell}?",
        "Write a bash script that {shell} and then {shell}.", "Explain a command line that {shell}.",
    ),
    "concept": (
        "Show {concept} in {programming} with an example about {}.", "Explain {concept} with an example.",
        "What is {concept}?", "When should I use {concept}?", "What is the difference between {concept} and {concept}?",
        "Explain {concept} to {audience}.", "Write {some} exercises on {concept}.",
    ),
    "debug": (
        "What is wrong with this code?\n\n```\n{code}\n```", "Explain this code.\n\n```\n{code}\n```",
        "Find the bug and fix it. I work on {entity}.\n\n```\n{code}\n```", "Write tests for this.\n\n```\n{code}\n```",
        "Rewrite this code in {programming}.\n\n```\n{code}\n```",
        "Add comments to this code for {audience}.\n\n```\n{code}\n```",
        "Can this be made faster or shorter?\n\n```\n{code}\n```",
        "What does this print if n is {2..90}?\n\n```\n{code}\n```",
    ),
    "arithmetic": (
        "What is {12..980} plus {12..980}?", "What is {12..99} times {3..25}?", "Calculate {200..999} - {11..199}.",
        "Divide {100..960} by {2..12}.", "What is {5..95}% of {40..900}?", "What is {2..9}/{3..12} + {2..9}/{3..12}?",
        "Solve for x: {2..9}x + {3..40} = {41..120}", "Is {101..999} a prime number?",
        "Round {10..99}.{101..989} to one decimal.", "What is the square of {11..45}?",
        "What is the average of {3..60}, {3..60}, {3..60} and {3..60}?", "Convert {3..300} {unit} to {unit}.",
        "Sort these numbers: {1..99}, {1..99}, {1..99}, {1..99}, {1..99}",
    ),
    "word problem": (
        "{name} has {12..60} {food} and gives {2..11} of them to {name}. How many are left?",
        "A train travels {60..200} km per hour for {2..9} hours. How far does it go?",
        "{name} buys {2..9} items for {3..40} dollars each and pays with {400..600} dollars. How much change is there?",
        "A rectangle is {3..40} cm long and {2..30} cm wide. What are its area and perimeter?",
        "{name} is {3..12} years older than {name}. Together they are {30..90}. How old is each?",
        "A shop sells {thing} for {20..300} dollars with {5..50} percent off. What is the price?",
        "{2..9} workers need {3..20} days for a job. How long do {10..20} workers need? Show your work.",
        "{name} reads {10..40} pages a day. How many days does a book of {150..700} pages take?",
        "A bag has {2..9} red and {2..9} blue marbles. How likely is it to draw a red one?",
        "{name} saves {5..90} dollars a week. When are there {500..2000} dollars for {thing}?",
    ),
    "translate": (
        "Translate into {language}: {sentence}", 'How do you say "{phrase}" in {language}?',
        "Translate this into {language} and explain the grammar.\n\n{sentence}",
        "What does this mean in {language}? {sentence}", "Write {two} simple sentences in {language} about {}.",
        "Teach me {some} {language} words about {}.", "Translate the text to {language}.\n\n{passage}",
    ),
    "summarize": (
        "Summarize this text.\n\n{passage}", "Summarize in {one} sentence:\n\n{passage}", "{passage}\n\nTL;DR",
        "What is the main point of this text?\n\n{passage}", "Give the key points as a list.\n\n{passage}",
        "Shorten this to {15..60} words.\n\n{passage}", "Read the text and then give it a title.\n\n{passage}",
        "{passage}\n\nSummarize the above for {audience}.",
    ),
    "read": (
        "Ask {two} questions about this text and answer them.\n\n{passage}", "What do we learn from this?\n\n{passage}",
        "Here is a text.\n\n{passage}\n\nWhat happened, and why?", "Which facts does the text give?\n\n{passage}",
        "{passage}\n\nIs this text rather {tone} or {tone}?", "Explain the difficult words in this text.\n\n{passage}",
        "Based on the text, what would you ask {job}?\n\n{passage}",
    ),
    "rewrite": (
        "Rewrite this in a {tone} tone: {sentence}", "Make this sound more {tone}.\n\n{passage}",
        "Paraphrase: {sentence}", "Rewrite the text for {audience}.\n\n{passage}",
        "Say this in other words: {sentence}", "Rewrite this as if {character} had said it: {sentence}",
        "Make this sentence longer and more {tone}: {sentence}", "Turn this into a question: {sentence}",
        "Rewrite in the past tense: {sentence}", "Turn this into a poem: {sentence}",
    ),
    "correct": (
        "Correct the mistakes: {wrong}", "Fix the grammar and spelling of this sentence.\n\n{wrong}",
        "Is this sentence correct? {wrong}", "Proofread this message to {name}.\n\n{wrong}",
        "Correct this and explain each mistake to {audience}.\n\n{wrong} {wrong}", 'What is wrong here? "{wrong}"',
    ),
    "continue": (
        "Continue this story.\n\n{opening}", "{opening}", "Finish the text: {opening}",
        "{opening}\n\nWhat happens next?", "Write a {genre} ending for this beginning: {opening}",
        "Continue in a {tone} style with {100..300} words.\n\n{opening}", "Complete the sentence: {start}",
        "Complete the sentence in {some} ways: {start}", "Write a story that begins like this: {opening}",
    ),
    "classify": (
        'Is this review positive or negative? "{comment}"',
        "What is the sentiment of this text?\n\n{comment} {comment}",
        "Classify as complaint, praise or question: {comment}",
        "Rate the mood of this message from 1 to {5..10}: {comment}",
        "Sort into groups: {food}, {animal}, {thing}, {food}, {animal}",
        "Which one does not belong: {food}, {food}, {animal}, {food}?",
        "Does this belong to sports, science or politics? {sentence}",
        "Reply to this customer in a {tone} way: {comment}",
    ),
    "extract": (
        "Extract the name, place and date as JSON.\n\n{record}",
        "Return a JSON object with the facts of this text.\n\n{record}",
        "List all names and numbers in this text.\n\n{record}", "Make a table from this.\n\n{record} {record}",
        "Who does what in this text? Answer with JSON: {record}", "When and where does it happen? {record}",
        "Turn this note into a calendar entry.\n\n{record}",
    ),
    "fact": (
        "Name {some} facts about {country} and {country}.", "Which is further north, {town} or {country}?",
        "What is the capital of {country}?", "Where is {place}, and what is it known for?",
        "What language do people speak in {country}?", "How many {unit} are in {2..50} {unit}?",
        "Who invented {invention}?", "When was {invention} invented?", "What is {food} made of?",
        "What do {animal} eat?", "How long do {animal} live?", "Where do {animal} live?",
        "Name {some} cities in {country}.", "What is {country} famous for?",
        "What year was {1..99} years before {1900..2020}?", "What color are {animal}?",
    ),
    "yes or no": (
        "Can {animal} swim?", "Is {country} bigger than {country}?", "Are {animal} dangerous?",
        "Do {animal} make good pets?", "Is it true that {} can be harmful?", "Yes or no: does {} cost money?",
        "Can you eat {food} every day?", "Is {place} worth a visit in {month}?", "Do I need {thing} for {skill}?",
        "Is {} older than {}?", "Can {character} teach {}?",
    ),
    "advice": (
        "{trouble} What should I do?", "{trouble} Any advice?", 'My friend {name} told me: "{trouble}" How can I help?',
        "{trouble} Give me {some} ideas.", "{trouble} I am {job}. How do I handle this?",
        "How do I deal with this? {trouble}", "What would {character} say to this? {trouble}",
        "{trouble} Write a message I could send to {name}.",
    ),
    "context": (
        "I am {job} and live in {town}. I want to learn {skill}, but I only have {2..9} hours a week. How should I "
        "go about it?",
        "We are {3..20} people and plan {event} in {month}. Some of us do not like {food}. What do you suggest?",
        "My {relative} is {4..90} years old and loves {}. I have {10..90} dollars. What could I give as a present?",
        "I read about {} yesterday and did not understand it. I know a little about {}. Can you connect the two?",
        "I have to give a talk on {} on {day}. My listeners know nothing about it. How do I begin?",
        "I moved from {country} to {country} last {month}. What will be different for me?",
        "{name} says that {} matters most, {name} says it is {}. Who is right?",
        "It is {day}, it rains, and I am bored. I like {} and {}. What can I do?",
    ),
    "chat": (
        "Hi, I'm {name} from {town}. How are you?", "Good morning! Today is {day}. What shall we talk about?",
        "Who are you, and can you help me with {}?", "I'm feeling {feeling} today.", "I just finished {skill}!",
        "My name is {name} and I like {}.", "Let's talk about {}.", "I love {}!", "I hate {}.",
        "Thank you! Now tell me something about {}.", "I'm {job}. What can you do for me?", "{}",
        "Tell me more about {} please",
    ),
    "format": (
        "Write about {} as a numbered list.", "Answer in JSON: what are {two} facts about {}?",
        "Write about {} with headings and bullet points.", "Answer with one word: what comes to mind with {}?",
        "Explain {} without using the letter {letter}.", "Write {some} questions about {}, nothing else.",
        "Give me a short and a long answer: what is {}?", "Write about {}. Begin each line with the letter {letter}.",
        "Write an outline of a book about {}.", "Write {two} sentences about {} that {manner}.",
    ),
}  # fmt: skip
KINDS: Final = {**ABOUT, **TASKS}
"""Forms by kind."""
QUESTIONS: Final = tuple(form for forms in KINDS.values() for form in forms)
