"""What a user says in five turns of a talk, on six subjects."""

TALKS = (
    (
        "Hi! I want to bake bread at home for the first time. What do I need?",
        "I only have dry yeast. Does that change anything?",
        "How long should the dough rest before I put it into the oven?",
        "My last cake was burnt on top and raw inside. How do I avoid that with bread?",
        "Great. Please sum up the steps in a short list.",
    ),
    (
        "We are going to Rome for three days in May. What should we see?",
        "My parents come along and they cannot walk far. Which of these places suit them?",
        "Where could we eat without spending too much?",
        "And what if it rains on the second day?",
        "Thank you! Write a plan for the three days in a few lines.",
    ),
    (
        "My Python program is slow. It reads a large file line by line and counts words. Any advice?",
        "I use a list and search it for every word. Is that bad?",
        "Can you show me how to do it with a dictionary?",
        "How would I print the ten most common words?",
        "And how do I find out which part of a program takes the most time?",
    ),
    (
        "I sleep badly lately. What can I do about it?",
        "I usually look at my phone in bed until midnight. Could that be the reason?",
        "Is coffee in the afternoon a problem as well?",
        "What would a good evening look like, hour by hour?",
        "When should I see a doctor about it?",
    ),
    (
        "Please explain to my daughter, who is nine, why the sky is blue.",
        "She asks why it is red in the evening, then.",
        "What is light made of, in simple words?",
        "Is there a small experiment that we could do at home to see this?",
        "Please write a little poem about it for her.",
    ),
    (
        "I have a job interview at a bookshop next week. How should I prepare?",
        "They may ask why I left my last job. It was because the pay was late every month. What do I say?",
        "Which questions should I ask them?",
        "What should I wear?",
        "Could you write a short note to thank them afterwards?",
    ),
)
