// The ai SDK: objects, tools in several steps, and streams, through its chat and its responses providers.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.URL}/v1`;
const apiKey = process.env.KEY;
const compatible = createOpenAICompatible({ name: "kevlarflow", baseURL, apiKey, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL, apiKey });
const models = [compatible("kevlar-demo"), openai.chat("kevlar-demo"), openai.responses("kevlar-demo")];

const schema = z.object({ name: z.string(), day: z.number().int() });
for (const model of models) {
  const common = { model, maxRetries: 0 };
  const said = await generateText({ ...common, prompt: "Say something" });
  assert.equal(said.text, "One moment.");
  assert.ok(said.usage.outputTokens > 0);
  const { object } = await generateObject({ ...common, schema, prompt: "An event" });
  assert.deepEqual(object, { name: "ball", day: 3 });
  const record = { schema: z.object({ counts: z.record(z.string(), z.number()), link: z.base64().optional() }) };
  await assert.rejects(generateObject({ ...common, ...record, prompt: "An event" }), /did not match schema/);
  const grown = streamObject({ ...common, schema, prompt: "An event" });
  for await (const _ of grown.partialObjectStream);
  assert.deepEqual(await grown.object, { name: "ball", day: 3 });
  for (const run of [generateText, streamText]) {
    const asked = [];
    const tools = {
      get_weather: tool({
        description: "The weather of a city",
        inputSchema: z.object({ city: z.string() }),
        execute: async (given) => { asked.push(given); return "rain"; },
      }),
    };
    const result = await run({ ...common, prompt: "Weather?", tools, stopWhen: stepCountIs(3) });
    assert.equal(await result.text, "It rains in Köln.");
    assert.deepEqual(asked, [{ city: "Köln" }]);
    // The conversation goes on with all that has been answered. Unless it is told not to store, the responses provider
    // sends names of items in their place, which a server without a store cannot read.
    const { messages } = await result.response;
    const said = [{ role: "user", content: "Weather?" }, ...messages, { role: "user", content: "And now?" }];
    const next = await run({ ...common, messages: said, tools, providerOptions: { openai: { store: false } } });
    assert.equal(await next.text, "It rains in Köln.");
  }
}
console.log("ok");
